"""The sections of a model card, each from the facts of a folder and the texts of a language."""

from collections.abc import Iterable, Mapping
from typing import Any

from glm_peft.arguments.methods import FULL, MERGED, PREFIX_TUNING
from glm_peft.prediction.generation_settings import GenerationSettings
from glm_peft.publishing.card.bootstrap import RESAMPLES, SEED
from glm_peft.publishing.card.code import Code
from glm_peft.publishing.card.facts import SHOWN_SCORES, Facts, Scores, is_number
from glm_peft.publishing.card.markdown import escape, escape_cell, fence, inline_code, shorten, table
from glm_peft.reporting.file_names import CURVES_NAME, PREDICTIONS_NAME
from glm_peft.reporting.results import format_bytes

SHOWN_EXAMPLES = 3
LONGEST_TEXT = 200  # characters of a text of an example

_SAMPLING = ("top_p", "top_k", "temperature")


class Sections:
    """
    What a card says, part by part.

    Args:
        facts: of the folder.
        texts: of the language, from `glm_peft.publishing.card.texts`.
        adapter: the folder or id that stands in the code.
    """

    def __init__(self, facts: Facts, texts: Mapping[str, str], adapter: str) -> None:
        self.facts, self.texts, self.adapter = facts, texts, adapter
        self.code = Code(facts, adapter, texts["question"])

    def all(self) -> str:
        """The card below its metadata."""
        parts = (self.introduction, self.examples, self.use, self.recipe, self.data)
        parts += (self.scores, self.curves, self.hardware, self.limits)
        return "\n\n".join(part() for part in parts) + "\n"

    def title(self) -> str:
        """The method and the base."""
        name = "full_title" if self.facts.method == FULL else "title"
        return self._say(name, method=self._method(), base=self.facts.base or self.texts["none"])

    def introduction(self) -> str:
        """What the adapter is and does, where it comes from, and the licence of its base."""
        facts, source = self.facts, self.facts.source("train")
        rows = _number(facts.part("data", "train").get("rows"))
        trained = self._say("trained_on", rows=rows, source=inline_code(source)) if source else None
        origins = {kind: facts.part(f"{kind}_from").get("name") for kind in ("continued", "pruned", "converted")}
        lines = [self._what(), trained or self._say("trained_on_unknown")]
        lines += [self._say(kind, name=inline_code(str(name))) for kind, name in origins.items() if name]
        base = [self._say("unknown_base")] if not facts.base else []
        if facts.base and not facts.base_is_on_hub and facts.method != FULL:
            base = [self._say("local_base", base=inline_code(facts.base), place=self.code.base)]
        return _paragraphs(f"# {escape(self.title())}", self._join(lines), *base, self._licence())

    def examples(self) -> str:
        """The first predictions, shortened."""
        facts = self.facts
        rows = facts.predictions[:SHOWN_EXAMPLES]
        if not rows:
            return self._section("examples", self._say("no_examples"))
        source = inline_code(facts.source("test")) if facts.source("test") else self.texts["test_set"]
        said = self._say(
            "examples_are", count=len(rows), rows=_number(len(facts.predictions)), source=source, limit=LONGEST_TEXT
        )
        head = [self.texts[name] for name in ("prompt", "reference", "answer")]
        cells = [[self._cell(row[name]) for name in ("prompt", "labels", "predict")] for row in rows]
        return self._section("examples", said, table(head, cells))

    def use(self) -> str:
        """How to load it, three ways."""
        is_full = self.facts.method == FULL
        given = self.code.chat_format
        return self._section(
            "use",
            self._say("adapter_place", place=self.adapter),
            f"### {self.texts['use_peft_full' if is_full else 'use_peft']}",
            *([self._say("use_format", chat_format=given)] if given else []),
            fence(self.code.stock(self.texts["comment_import"]), "python"),
            f"### {self.texts['use_python']}",
            fence(self.code.toolkit(), "python"),
            f"### {self.texts['use_command']}",
            fence(self.code.predict(), "bash"),
        )

    def recipe(self) -> str:
        """The command that repeats the run, and the settings that one looks for."""
        command = self.code.train()
        if command is None:
            return self._section("recipe", self._say("recipe_unknown"))
        said = self._say("recipe_is" if self.facts.part("flags") else "recipe_old")
        rows = [[inline_code(name), _setting(value)] for name, value in self.facts.part("recipe").items()]
        resumed = [self._say("resumed")] if self.facts.record.get("resumed") else []
        head = [self.texts["setting"], self.texts["value"]]
        return self._section("recipe", said, fence(command, "bash"), *resumed, *([table(head, rows)] if rows else []))

    def data(self) -> str:
        """The splits, by which they are known again, and their language."""
        splits = [name for name in ("train", *self.facts.validations, "test") if self.facts.part("data", name)]
        languages = self.facts.languages
        language = self._say("languages", languages=self._languages()) if languages else self._say("languages_unknown")
        if not splits:
            return self._section("data", self._say("data_unknown"), language)
        head = [self.texts[name] for name in ("split", "source", "rows", "fingerprint")]
        rows = [[self._split(name), *self._data_cells(self.facts.part("data", name))] for name in splits]
        return self._section("data", table(head, rows), self._say("fingerprint_is"), language)

    def scores(self) -> str:
        """The scores of each split by their protocol, with intervals where the answers are there."""
        facts = self.facts
        train_loss = facts.results.get("train_loss")
        trained = [self._say("train_loss", loss=f"{train_loss:.4f}")] if is_number(train_loss) else []
        if not facts.scores:
            return self._section("scores", self._say("scores_unknown"), *trained)
        protocol = self.texts.get(f"protocol_{facts.protocol}")
        tables = [part for scores in facts.scores for part in self._score_parts(scores)]
        has_intervals = any(scores.intervals for scores in facts.scores)
        about = [self._say("interval_is", resamples=f"{RESAMPLES:,}", seed=SEED)] if has_intervals else []
        said = [*filter(None, [protocol, self._decoding()])]
        no_interval = self._say("no_interval", file=inline_code(PREDICTIONS_NAME))
        return self._section("scores", *([self._join(said)] if said else []), *tables, *about, no_interval, *trained)

    def curves(self) -> str:
        """The picture, by a link that holds wherever the folder lies."""
        picture = f"![{self.texts['curves_alt']}]({CURVES_NAME})"
        return self._section("curves", picture if self.facts.has_curves else self._say("curves_unknown"))

    def hardware(self) -> str:
        """The device, times, memory and versions."""
        rows = list(self._hardware_rows())
        if not rows:
            return self._section("hardware", self._say("hardware_unknown"))
        return self._section("hardware", table([self.texts["setting"], self.texts["value"]], rows))

    def limits(self) -> str:
        """What the adapter cannot do, and what nobody looked at."""
        return self._section("limits", "\n".join(f"- {line}" for line in self._limit_lines()))

    def _say(self, text: str, /, **values: Any) -> str:
        return self.texts[text].format(**values)

    def _section(self, name: str, *parts: str) -> str:
        return _paragraphs(f"## {self.texts[name]}", *parts)

    def _join(self, sentences: Iterable[str]) -> str:
        """Sentences in a line: Chinese ones touch."""
        return self.texts["between_sentences"].join(sentences)

    def _method(self) -> str:
        return self.texts.get(self.facts.method, self.facts.method)

    def _what(self) -> str:
        facts, base = self.facts, inline_code(self.facts.base) if self.facts.base else "?"
        if facts.method == FULL:
            return self._say("what_full", base=base)
        count = facts.adapter.get("num_virtual_tokens")
        article = self.texts["an" if self._method().strip("(")[0] in "AEIO" else "a"]
        tokens = self._say("tokens", count=count) if count else ""
        size = self._say("size", size=format_bytes(facts.weights_bytes)) if facts.weights_bytes else ""
        said = self._say("what", article=article, method=self._method(), tokens=tokens, base=base, size=size)
        commit = facts.part("base").get("revision")
        return self._join([said, self._say("revision", revision=commit)]) if commit else said

    def _licence(self) -> str:
        licence = self.facts.licence
        if not licence:
            return self._say("licence_unknown")
        name, link = licence.get("license_name") or licence["license"], licence.get("license_link")
        return self._say("licence", licence=f"[{escape(name)}]({link})" if link else escape(name))

    def _cell(self, text: str | None) -> str:
        return self.texts["none"] if text is None else escape_cell(shorten(text, LONGEST_TEXT))

    def _split(self, name: str, kind: str = "") -> str:
        """Such as validation, or that of several with its name."""
        known, _, own = name.partition("_")
        return self.texts[kind + known] + (f" {inline_code(own)}" if own else "")

    def _languages(self) -> str:
        return self.texts["and"].join(self.texts.get(name, name) for name in self.facts.languages)

    def _data_cells(self, data: Mapping[str, Any]) -> list[str]:
        name, config = data.get("file") or data.get("dataset") or self.texts["none"], data.get("config")
        digest = data.get("sha256") or data.get("rows_sha256")
        named = inline_code(str(name)) + (f" ({escape(str(config))})" if config else "")
        return [named, _number(data.get("rows")), inline_code(str(digest)) if digest else self.texts["none"]]

    def _decoding(self) -> str | None:
        """How the answers were generated, where it was in the run and not afterwards."""
        facts, flags = self.facts, self.facts.part("flags")
        is_of_run = facts.part("scores").get("predict_bleu-4") == facts.results.get("predict_bleu-4")
        if not flags or not is_of_run or not any("bleu-4" in scores.values for scores in facts.scores):
            return None
        beams = flags.get("num_beams", 1)
        said = self._say("beams", beams=beams) if beams != 1 else self.texts["greedy"]
        if flags.get("do_sample"):
            given = {name: flags.get(name, getattr(GenerationSettings, name)) for name in _SAMPLING}
            said = self._say("sampled", settings=", ".join(f"{name} {value}" for name, value in given.items()))
        return self._say("decoding", how=said, length=self.code.length)

    def _score_parts(self, scores: Scores) -> list[str]:
        source, count = self.facts.source(scores.split), ""
        if scores.examples:
            count = self._say("count", count=_number(scores.examples))
        split = self._split(scores.split, "split_")
        named = "scores_of" if source else "scores_of_unnamed"
        said = self._say(named, split=split, source=inline_code(source or ""), examples=count)
        head = [self.texts["score"], self.texts["value"], self.texts["interval"]]
        rows = [self._score_row(name, scores) for name in SHOWN_SCORES if name in scores.values]
        columns = 3 if scores.intervals else 2
        return [said, table(head[:columns], [row[:columns] for row in rows])]

    def _score_row(self, name: str, scores: Scores) -> list[str]:
        span = scores.intervals.get(name)
        # The loss, and BLEU-4 where it is below 1.
        digits = 4 if name == "loss" or (name == "bleu-4" and self.facts.protocol == "chatglm3") else 2
        ends = f"{span[0]:.{digits}f} … {span[1]:.{digits}f}" if span else self.texts["none"]
        value = scores.values[name]
        return [self.texts[name], f"{value}" if isinstance(value, int) else f"{value:.{digits}f}", ends]

    def _hardware_rows(self) -> Iterable[list[str]]:
        facts = self.facts
        hardware, memory = facts.part("hardware"), facts.part("measured", "peak_memory")
        for name in ("device", "processes", "threads"):
            if name in hardware:
                yield [self.texts[name], escape(str(hardware[name]))]
        if hardware.get("engine", "NO") != "NO":
            yield [self.texts["engine"], escape(str(hardware["engine"]))]
        for task, seconds in facts.seconds.items():
            yield [self.texts[f"seconds_{task}"], f"{seconds:,.1f}"]
        first = self.texts["first_process"] if hardware.get("processes", 1) != 1 else ""
        for name in ("gpu_bytes", "resident_bytes"):
            if is_number(memory.get(name)):
                yield [self.texts[name] + first, _size(memory[name])]
        if "date" in facts.record:
            yield [self.texts["date"], escape(str(facts.record["date"]))]
        if facts.part("versions"):
            versions = ", ".join(f"{name} {version}" for name, version in facts.part("versions").items())
            yield [self.texts["versions"], escape(versions)]

    def _limit_lines(self) -> Iterable[str]:
        facts, recipe = self.facts, self.facts.part("recipe")
        if facts.method == PREFIX_TUNING:
            yield self.texts["limit_prefix"]
        elif facts.method in MERGED:
            yield self.texts["limit_merge"]
        elif facts.method != FULL:
            yield self.texts["limit_virtual"]
        if facts.method != FULL:
            digest = facts.part("base").get("config_sha256")
            yield self._say("limit_base", config=self._say("config", digest=str(digest)[:12]) if digest else "")
        if recipe.get("quantization_bit"):
            yield self._say("limit_bits", bits=recipe["quantization_bit"])
        source, target = recipe.get("max_source_length"), recipe.get("max_target_length")
        lengths = "limit_lengths" if source and target else "limit_lengths_unknown"
        yield self._say(lengths, source=source, target=target)
        languages = self._languages()
        yield self._say("limit_language", languages=languages) if languages else self.texts["limit_language_unknown"]
        yield from (self.texts["limit_data"], self.texts["limit_scores"])


def _paragraphs(*parts: str) -> str:
    return "\n\n".join(parts)


def _number(value: Any) -> str:
    return f"{value:,}" if is_number(value) else "?"


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else format_bytes(size)


def _setting(value: Any) -> str:
    if isinstance(value, str):
        return inline_code(value)
    return f"{value:.6g}" if isinstance(value, float) else escape(str(value))
