"""
The model card of an output folder, from nothing but what the folder holds: the same folder gives the same card.

Training writes it, and whoever publishes the folder can write it again with ids of the Hub in it.
"""

from pathlib import Path

from accelerate import PartialState
from huggingface_hub import EvalResult, ModelCardData

from glm_peft.arguments.methods import FULL, PREFIX_TUNING
from glm_peft.errors import UserError
from glm_peft.metrics import SCORE_NAMES
from glm_peft.publishing.card.facts import Facts, Scores, is_hub_id, read_facts
from glm_peft.publishing.card.sections import Sections
from glm_peft.publishing.card.texts import TEXTS
from glm_peft.reporting.files import write_atomically

CARD_NAME = "README.md"

_METRICS = {name: "bleu" if name == "bleu-4" else "rouge" for name in SCORE_NAMES} | {"exact_match": "exact_match"}
_METRICS |= {"loss": "loss"}
_FILE_TYPES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_PREFIX_TAGS = ["p-tuning-v2", "prefix-tuning"]


def build_card(
    folder: str | Path, base_model_id: str | None = None, language: str | None = None, adapter_id: str | None = None
) -> str:
    """
    The card as Markdown with its metadata.

    Args:
        folder: what a training run left, or an adapter of PEFT's, of which less is known.
        base_model_id: the base's id on the Hub, where the run had it from a folder.
        language: `en` or `zh`; `None` for what the run was told, or else English.
        adapter_id: where the card will be on the Hub; `None` for a place to fill in.

    Raises:
        UserError: there is no adapter and no model in the folder, or `base_model_id` is no id, or the language is
            not one of these.
    """
    facts = read_facts(folder, base_model_id)
    language = language or next((name for name in TEXTS if name == facts.record.get("card_language")), "en")
    if language not in TEXTS:
        raise UserError(f"--card_language {language} is not known: give one of {', '.join(TEXTS)}.")
    adapter = adapter_id or f"path/to/{'model' if facts.method == FULL else 'adapter'}"
    metadata = build_metadata(facts, Sections(facts, TEXTS["en"], adapter).title())
    return f"---\n{metadata.to_yaml(line_break=chr(10))}\n---\n\n{Sections(facts, TEXTS[language], adapter).all()}"


def write_card(folder: str | Path) -> None:
    """Write `README.md` into an output folder, in the main process."""
    if PartialState().is_main_process:
        write_atomically(Path(folder) / CARD_NAME, build_card(folder))


def build_metadata(facts: Facts, title: str) -> ModelCardData:
    """What the Hub reads of a card; what is not known is left out."""
    is_full = facts.method == FULL
    base = facts.base if facts.base_is_on_hub else None
    data_set = facts.part("data", "train").get("dataset")
    results = [result for scores in facts.scores for result in _eval_results(facts, scores)]
    return ModelCardData(
        library_name="transformers" if is_full else "peft",
        base_model=base,
        base_model_relation=("finetune" if is_full else "adapter") if base else None,
        language=facts.languages or None,
        **facts.licence,
        pipeline_tag="text-generation",
        tags=_tags(facts),
        datasets=[data_set] if data_set and is_hub_id(data_set) else None,
        metrics=list(dict.fromkeys(result.metric_type for result in results if result.metric_type != "loss")) or None,
        model_name=title if results else None,
        eval_results=results or None,
    )


def _tags(facts: Facts) -> list[str]:
    own = _PREFIX_TAGS if facts.method == PREFIX_TUNING else [facts.method.replace("_", "-")]
    return ([] if facts.method == FULL else own) + ["chatglm"]


def _eval_results(facts: Facts, scores: Scores) -> list[EvalResult]:
    """For the model-index: the scores on a data set that has a name."""
    data, name = facts.part("data", scores.split), facts.source(scores.split)
    if not name:
        return []
    kind = _FILE_TYPES.get(Path(name).suffix.lower(), "text") if data.get("file") else name
    found = [metric for metric in _METRICS if metric in scores.values]
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=kind,
            dataset_name=name,
            dataset_config=data.get("config"),
            dataset_split=scores.split,
            metric_type=_METRICS[metric],
            metric_name=TEXTS["en"][metric],
            metric_value=round(scores.values[metric], 4),
            metric_config=facts.protocol if metric in SCORE_NAMES else None,
        )
        for metric in found
    ]
