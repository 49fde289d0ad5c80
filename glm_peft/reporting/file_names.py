"""The names of the files that a run leaves in its output folder."""

PROVENANCE_NAME = "provenance.json"
RESULTS_NAME = "all_results.json"
PREDICT_RESULTS_NAME = "predict_results.json"
PREDICTIONS_NAME = "generated_predictions.jsonl"
CURVES_NAME = "training_curves.png"
CARD_NAME = "README.md"
CONVERSATIONS_NAME = "conversations.jsonl"
