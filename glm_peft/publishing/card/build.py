"""
Build the model card of an output folder from nothing but what the folder holds: the same folder gives the same card.

Training writes it, and a push builds it again with Hub ids in it.
"""

from pathlib import Path

from accelerate import PartialState
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from glm_peft.arguments.methods import PREFIX_TUNING
from glm_peft.distillation.report import format_comparison
from glm_peft.errors import UserError
from glm_peft.hub.rights import is_hub_id
from glm_peft.metrics import SCORE_NAMES
from glm_peft.publishing.card import bootstrap, markdown
from glm_peft.publishing.card.commands import quoted
from glm_peft.publishing.card.facts import Facts, read_facts
from glm_peft.publishing.card.scores import Scores, show_score
from glm_peft.reporting.file_names import CARD_NAME, COMPARISON_PICTURE_NAME, CURVES_NAME, PREDICTIONS_NAME
from glm_peft.reporting.files import write_atomically
from glm_peft.reporting.results import format_bytes

TEMPLATES = {"en": Path(__file__).with_name("card.md.jinja"), "zh": Path(__file__).with_name("card_zh.md.jinja")}
"""By the value of `--card_language`."""

# By our names: the type by which the Hub knows the metric, and the title.
_METRICS = {
    "rouge-1": ("rouge", "ROUGE-1"),
    "rouge-2": ("rouge", "ROUGE-2"),
    "rouge-l": ("rouge", "ROUGE-L"),
    "bleu-4": ("bleu", "BLEU-4"),
    "exact_match": ("exact_match", "exact match, %"),
    "loss": ("loss", "loss, nats per token"),
    "rewards/accuracies": ("accuracy", "pairs whose chosen answer has the higher reward, 0 to 1"),
}
_FILE_TYPES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_PREFIX_TAGS = ["p-tuning-v2", "prefix-tuning"]
_IN_TEMPLATES = {
    "escape": markdown.escape,
    "escape_cell": markdown.escape_cell,
    "escape_messages": markdown.escape_messages,
    "inline_code": markdown.inline_code,
    "fence": markdown.fence,
    "show_count": markdown.show_count,
    "show_setting": markdown.show_setting,
    "show_score": show_score,
    "quoted": quoted,
    "format_bytes": format_bytes,
    "format_comparison": format_comparison,
    "comparison_picture_name": COMPARISON_PICTURE_NAME,
    "curves_name": CURVES_NAME,
    "predictions_name": PREDICTIONS_NAME,
    "resamples": bootstrap.RESAMPLES,
    "seed": bootstrap.SEED,
}


def build_card(
    folder: str | Path,
    base_model_id: str | None = None,
    language: str | None = None,
    adapter_id: str | None = None,
    examples: int | None = None,
) -> str:
    """
    Build the card as Markdown with its metadata.

    Args:
        folder: what a training run left, or an adapter of PEFT's, of which less is known.
        base_model_id: the base's id on the Hub, where the run had it from a folder.
        language: `en` or `zh`; `None` for what the run was told, or else English.
        adapter_id: where the card will be on the Hub; `None` for a placeholder.
        examples: the most rows of data that it shows; `None` for what the run was told, or else 3.

    Raises:
        UserError: there is no adapter and no model in the folder, or `base_model_id` is no id, or the language is
            not one of these.
    """
    facts = read_facts(folder, base_model_id, adapter_id, examples)
    language = language or (facts.card_language if facts.card_language in TEMPLATES else "en")
    if language not in TEMPLATES:
        raise UserError(f"--card_language {language} is not known: give one of {', '.join(TEMPLATES)}.")
    # The facts are variables of the template and never templates themselves: Jinja does not look into them.
    values = {**_IN_TEMPLATES, **vars(facts)}
    return str(ModelCard.from_template(build_metadata(facts), template_path=str(TEMPLATES[language]), **values))


def write_card(folder: str | Path) -> None:
    """Write `README.md` into an output folder, in the main process."""
    if PartialState().is_main_process:
        write_atomically(Path(folder) / CARD_NAME, build_card(folder))


def build_metadata(facts: Facts) -> ModelCardData:
    """Return what the Hub reads of a card; what is not known is left out."""
    base = facts.base if facts.base_is_on_hub else None
    trained_on = [split.source for split in facts.train_sets if not split.is_file and is_hub_id(split.source)]
    results = [result for scores in facts.scores for result in _eval_results(scores, facts.protocol)]
    # `ModelCardData` raises where there are results and no name of the model.
    title = f"{'Fully fine-tuned model' if facts.is_full else facts.method_title}: {facts.base or '–'}"
    return ModelCardData(
        library_name="transformers" if facts.is_full else "peft",
        base_model=base,
        base_model_relation=("finetune" if facts.is_full else "adapter") if base else None,
        language=facts.languages or None,
        **facts.licence,
        pipeline_tag="text-generation",
        tags=_tags(facts),
        # Ids alone, which the Hub links; the name of a file is told in the model-index.
        datasets=list(dict.fromkeys(trained_on)) or None,
        metrics=list(dict.fromkeys(result.metric_type for result in results if result.metric_type != "loss")) or None,
        model_name=title if results else None,
        eval_results=results or None,
    )


def _tags(facts: Facts) -> list[str]:
    own = _PREFIX_TAGS if facts.method == PREFIX_TUNING else [facts.method.replace("_", "-")]
    return ([] if facts.is_full else own) + ["chatglm"]


def _eval_results(scores: Scores, protocol: str | None) -> list[EvalResult]:
    """Return the scores on a data set that has a name, for the model-index."""
    split = scores.split
    if not split.source:
        return []
    kind = _FILE_TYPES.get(Path(split.source).suffix.lower(), "text") if split.is_file else split.source
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=kind,
            dataset_name=split.source,
            dataset_config=split.config,
            dataset_split=split.name,
            metric_type=metric_type,
            metric_name=title.replace("token", "pair") if "rewards/accuracies" in scores.values else title,
            metric_value=round(scores.values[metric], 4),
            metric_config=protocol if metric in SCORE_NAMES else None,
        )
        for metric, (metric_type, title) in _METRICS.items()
        if metric in scores.values
    ]
