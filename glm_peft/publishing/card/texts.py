"""What a model card says, in English; what stands in braces is filled in by the sections."""

from collections.abc import Mapping

from glm_peft.publishing.card.texts_zh import CHINESE

ENGLISH: Mapping[str, str] = {
    "title": "{method}: {base}",
    "full_title": "Fully fine-tuned model: {base}",
    "prefix_tuning": "P-Tuning v2 prefix",
    "lora": "LoRA adapter",
    "p_tuning": "P-Tuning adapter",
    "prompt_tuning": "prompt tuning adapter",
    "ia3": "(IA)³ adapter",
    "a": "A",
    "an": "An",
    "what": "{article} {method}{tokens} for {base}, trained with `glm_peft` and saved as a PEFT adapter{size}.",
    "what_full": "{base}, all of it trained with `glm_peft`.",
    "tokens": " of {count} virtual tokens",
    "size": " of {size}",
    "revision": "Of the base, commit `{revision}` was used.",
    "trained_on": "It was trained on {rows} rows of {source} and answers as these do.",
    "trained_on_unknown": "On what it was trained is not recorded here.",
    "continued": "It started from {name}.",
    "pruned": "It was made from {name} by leaving out virtual tokens.",
    "converted": "It was made from the published checkpoint {name}.",
    "local_base": (
        "The base was in a folder called {base}, and its id on the Hub is not recorded: put that id, or the path "
        "of your copy, in the place of `{place}`."
    ),
    "unknown_base": "Which base it belongs to is not recorded.",
    "licence": "Licence of the base: {licence}. It holds for what is made from the base, too.",
    "licence_unknown": (
        "The licence of the base is not known here, and so none is named: read it where the base comes from."
    ),
    "examples": "Examples",
    "examples_are": (
        "The first {count} of {rows} rows of {source} as they were answered. Texts of more than {limit} "
        "characters are cut there and end in “…”."
    ),
    "test_set": "the test set",
    "no_examples": "There are none: answers to a test set (`--do_predict`) were not there when this card was written.",
    "prompt": "prompt",
    "reference": "reference",
    "answer": "answer",
    "use": "Use",
    "adapter_place": "`{place}` is the folder that this card is in, or its id on the Hub.",
    "use_peft": "With PEFT and transformers",
    "use_peft_full": "With transformers",
    "use_format": (
        "Its prompts are those of `--chat_format {chat_format}`, which the tokenizer's files do not say: made below."
    ),
    "use_python": "With this toolkit, in Python",
    "use_command": "With this toolkit, from the command line",
    "comment_import": "teaches transformers the published ChatGLM folders",
    "question": "Hello",
    "recipe": "Recipe",
    "recipe_is": (
        "In a checkout of `glm_peft` this command repeats the run. It has every flag that was not at its default, "
        "but those that say where results, logs and downloads go; files stand in it by their names "
        "([data](#data))."
    ),
    "recipe_old": "Which flags were given is not recorded; this command has the settings that are.",
    "recipe_unknown": "How it was trained is not recorded here.",
    "resumed": "The run was stopped in between and resumed.",
    "setting": "setting",
    "value": "value",
    "data": "Data",
    "split": "split",
    "rows": "rows used",
    "source": "file or data set",
    "fingerprint": "SHA-256",
    "train": "training",
    "validation": "validation",
    "test": "test",
    "languages": "Language of the rows, as detected: {languages}.",
    "languages_unknown": "The language of the rows is not known.",
    "zh": "Chinese",
    "en": "English",
    "fingerprint_is": (
        "The SHA-256 is that of a file's bytes, and of a Hub data set that of its rows as lines of JSON."
    ),
    "data_unknown": "The data are not recorded here.",
    "scores": "Scores",
    "scores_unknown": (
        "There are none: nothing was evaluated when this card was written, and how good the answers are is not known."
    ),
    "scores_of": "On {split} ({source}){examples}:",
    "scores_of_unnamed": "On {split}{examples}:",
    "split_test": "the test set",
    "split_validation": "the validation set",
    "count": ", {count} examples",
    "score": "score",
    "interval": "95 % interval",
    "interval_is": (
        "95 % interval: where the score lies in 95 of 100 draws of as many examples, with replacement, from this "
        "set (percentile bootstrap, {resamples} draws, seed {seed}). It says nothing of other seeds of training."
    ),
    "no_interval": (
        "No interval: the loss, a mean over tokens; counts; a score that all examples share; and sets whose "
        "answers are not kept in {file} or are of another run."
    ),
    "protocol_thudm": (
        "Protocol `thudm`, means over the examples: ROUGE F over jieba words, and BLEU-4 over characters with "
        "smoothing 3, from 0 to 100."
    ),
    "protocol_chatglm3": (
        "Protocol `chatglm3`, means over the examples: ROUGE F over jieba words, from 0 to 100, and BLEU-4 over "
        "jieba words with smoothing 3, from 0 to 1."
    ),
    "decoding": "Answers of {length} tokens at most: {how}.",
    "greedy": "the likeliest token each time",
    "beams": "the best of {beams} beams",
    "sampled": "drawn at random ({settings})",
    "rouge-1": "ROUGE-1",
    "rouge-2": "ROUGE-2",
    "rouge-l": "ROUGE-L",
    "bleu-4": "BLEU-4",
    "exact_match": "exact match, %",
    "loss": "loss, nats per token",
    "prediction_length": "length of the answers, characters",
    "reference_length": "length of the references, characters",
    "empty_predictions": "empty answers",
    "empty_references": "empty references",
    "train_loss": "Loss in training, over all steps: {loss} nats per token.",
    "curves": "Curves",
    "curves_alt": "Loss, learning rate, gradient norm and scores over the steps",
    "curves_unknown": "There is no picture of the curves.",
    "hardware": "Hardware and time",
    "hardware_unknown": "Hardware and time are not recorded here.",
    "device": "device",
    "processes": "processes",
    "threads": "threads of each process",
    "engine": "processes joined by",
    "seconds_train": "training, seconds",
    "seconds_evaluate": "evaluation at the end, seconds",
    "seconds_predict": "prediction, seconds",
    "gpu_bytes": "peak memory of the tensors on the GPU",
    "resident_bytes": "peak resident memory",
    "first_process": " (first process)",
    "date": "date",
    "versions": "versions",
    "limits": "Limits",
    "limit_prefix": (
        "It cannot be merged into the base, as a prefix adds keys and values, and vLLM does not serve it: "
        "transformers with PEFT does."
    ),
    "limit_virtual": "It cannot be merged into the base, and vLLM does not serve it: transformers with PEFT does.",
    "limit_merge": "It can be merged into the base: `python -m glm_peft.convert merge`.",
    "limit_base": "It belongs to this base alone{config}. On another of the same sizes it loads and gives nonsense.",
    "config": " (SHA-256 of its network's settings: `{digest}`)",
    "limit_bits": "The base was quantized to {bits} bits in training; on a base that is not, answers differ.",
    "limit_lengths": (
        "In training, prompts were cut to {source} tokens and answers to {target}: of longer texts nothing is known."
    ),
    "limit_lengths_unknown": "To which lengths it was trained is not recorded.",
    "limit_language": "It was trained on rows in {languages}; of other languages nothing is known.",
    "limit_language_unknown": "In which language it can be used is not known.",
    "limit_data": (
        "It was trained for one kind of rows. What the base can do besides may have suffered, and was not measured."
    ),
    "limit_scores": (
        "ROUGE and BLEU compare words with one reference each; whether an answer is true, they do not say."
    ),
    "none": "–",
    "and": " and ",
    "between_sentences": " ",
}

TEXTS: Mapping[str, Mapping[str, str]] = {"en": ENGLISH, "zh": CHINESE}
"""By the value of `--card_language`."""
