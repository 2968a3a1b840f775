"""The options of data: which data sets, how their rows become texts and conversations, and how these are cut into batches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from nullspace.checks import check_integer
from nullspace.cli import options
from nullspace.cli.options import RUN_ON_DATA, Values, data_of, needed, needs_data, option, parse_weights, parsed
from nullspace.errors import MissingFileError

if TYPE_CHECKING:
    from nullspace.integrations.transformers import Mixture

TEXT_ENDINGS = (".txt", ".md")
FILE_ENDINGS = (*TEXT_ENDINGS, ".jsonl", ".json", ".parquet", ".csv")


def check_file(name: str, data: str) -> None:
    """The check of --task-data and its like: a name that ends as a file's is one that exists."""
    path = Path(data)
    if path.suffix.lower() in FILE_ENDINGS and not path.is_file():
        raise MissingFileError(f"{name}: {data} is not a file")


def _check_files(name: str, data: list[str]) -> None:
    for each in data:
        check_file(name, each)


def _check_template(name: str, template: str) -> None:
    from nullspace.integrations.transformers.template import read_template

    read_template(template)


def _check_whole(name: str, value: int) -> None:
    check_integer(name, value, least=0)


def _has_kind(values: Values, others: tuple[str, ...]) -> bool:
    """Whether some of the data are of another kind than files with these endings."""
    return any(Path(each).suffix.lower() not in others for each in data_of(values)[1])


_ROWS = needs_data("{} with fields (JSON, CSV, Parquet, a hub data set)", lambda values: _has_kind(values, TEXT_ENDINGS))
_HUB = needs_data("{} that is a hub data set, not a file", lambda values: _has_kind(values, FILE_ENDINGS))
_SEVERAL = needed("several --data", lambda values: len(values["data"] or ()) > 1)

DATA = option(
    "What must not be forgotten: a text, JSON Lines, JSON, CSV or Parquet file, or a hub data set; may be repeated.",
    None,
    _check_files,
)
ALONE = DATA._replace(help="A file or a hub data set; may be repeated.", default=options.REQUIRED)
WEIGHTS = option(
    "Of several --data, the share of the tokens of each: '3,1'; equal by default.", None, parsed(parse_weights), _SEVERAL
)


SAMPLES = option("Sequences to calibrate on.", 256, check_integer, RUN_ON_DATA)
LENGTH = option("Tokens a sequence.", 1024, check_integer, RUN_ON_DATA)
BATCH_SIZE = option("Sequences a batch.", 4, check_integer, RUN_ON_DATA)


@dataclass(frozen=True)
class Text:
    """How data are read and cut into batches."""

    PANEL: ClassVar[str] = "Data"

    field: str | None = option("Field(s) that hold the text, joined if several: 'question,answer'.", None, needs=_ROWS)
    split: str = option("Split of a hub data set.", "train", needs=_HUB)
    skip: int = option("Leave out so many rows (paragraphs of a text) at the beginning.", 0, _check_whole, RUN_ON_DATA)
    shuffle: int | None = option("Bring all rows into the random order of this seed.", None, _check_whole, RUN_ON_DATA)
    as_chat: bool = option(
        "Put texts into the chat template too: a question and its answer, or a text as a user's message.", False, needs=RUN_ON_DATA
    )
    template: str | None = option(
        "Chat template in the place of the tokenizer's own: a Jinja file.", None, _check_template, RUN_ON_DATA
    )
    system: str | None = option("System message of conversations that have none.", None, needs=RUN_ON_DATA)
    samples: int = SAMPLES
    length: int = LENGTH
    batch_size: int = BATCH_SIZE

    def mixture(self, data: list[str], weights: str | None = None) -> Mixture:
        """The data, which are read when batches are made of them. Missing files and wrong weights are errors now."""
        from nullspace.integrations.transformers.data import Reading

        own = {name: getattr(self, name) for name in ("field", "split", "skip", "shuffle", "as_chat")}
        return Reading(**own).mixture(data, None if weights is None else parse_weights(weights))

    def batches(self, mixture: Mixture, tokenizer: Any) -> Any:
        """The data in batches."""
        from nullspace.integrations.transformers import PackedBatches

        own = {name: getattr(self, name) for name in ("samples", "length", "batch_size", "template", "system")}
        return PackedBatches(mixture, tokenizer, **own)

    def record(self) -> dict[str, Any]:
        """What to keep of the form in which the model is calibrated, where it is not the default."""
        own = {name: getattr(self, name) for name in ("as_chat", "template", "system")}
        return {name: value for name, value in own.items() if value}


def described(data: list[str], weights: str | None) -> str:
    """The data sets in one text: "a.jsonl", or "a.jsonl (3), b.parquet (1)"."""
    if weights is None:
        return ", ".join(data)
    return ", ".join(f"{each} ({weight:g})" for each, weight in zip(data, parse_weights(weights), strict=True))
