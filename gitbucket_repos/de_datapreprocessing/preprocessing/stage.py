"""The preprocess stage: read, decode, keep what is unique, split, pack, describe."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from airloom.contract import Output, RejectedRow, Stage, StageInputError, StageRequest, StageResult
from airloom.contract.card import CARD_FILE, REJECTED_FILE
from preprocessing.card import describe
from preprocessing.decode import Row, decode_row
from preprocessing.duplicates import keep_unique
from preprocessing.object_source import ObjectSource
from preprocessing.pack import pack
from preprocessing.parallel import map_in_order
from preprocessing.params import PreprocessParams
from preprocessing.progress import counting
from preprocessing.rejects import keep_originals, write_list
from preprocessing.source import Entry, FolderSource, Source
from preprocessing.split import divide

# Threads mostly wait for the store; decoding releases the interpreter's lock.
WORKERS = 8


def preprocess(request: StageRequest) -> StageResult:
    """Make the dataset that `request` asks for. Equal files, parameters and seed give equal bytes."""
    started_at = time.time()
    params = PreprocessParams.of(request.params)
    source = _source(request)
    rows, broken = _decode_all(source, params.image_size)
    kept, repeated = keep_unique(rows)
    rejected = [*broken, *repeated]
    _check_usable(kept, rejected)

    dataset = request.outputs["dataset"]
    splits = divide(kept, fractions=params.split, seed=request.seed)
    shards = pack(dataset, splits, rows_per_shard=params.rows_per_shard)
    size_bytes = sum(path.stat().st_size for path in shards)
    card = describe(splits, rejected, image_size=params.image_size, size_bytes=size_bytes)
    card.write(dataset / CARD_FILE)
    write_list(dataset / REJECTED_FILE, rejected)
    outputs = {"dataset": Output.of(dataset)}
    if "rejected" in request.outputs:
        keep_originals(request.outputs["rejected"], rejected, source)
        outputs["rejected"] = Output.of(request.outputs["rejected"])

    sizes = ", ".join(f"{count:,} {name}" for name, count in card.rows.items())
    print(f"packed {card.total_rows:,} rows ({sizes}) into {len(shards)} shards, {size_bytes:,} bytes", flush=True)
    print(f"kept aside {card.total_rejected:,} files: {card.rejected or 'none'}", flush=True)
    return StageResult(
        stage=Stage.PREPROCESS,
        status="ok",
        outputs=outputs,
        metrics={
            "rows": card.total_rows,
            "rejected": card.total_rejected,
            "duplicates": card.duplicates,
            "leaks": card.leaks,
            "size_bytes": size_bytes,
            **{f"rows.{name}": count for name, count in card.rows.items()},
        },
        facts={"classes": ",".join(card.classes)},
        started_at=started_at,
        finished_at=time.time(),
    )


def _source(request: StageRequest) -> Source:
    if "folder" in request.inputs:
        return FolderSource(request.inputs["folder"])
    if "manifest" not in request.inputs:
        raise StageInputError(f"no input 'manifest' or 'folder' in the request; it has {sorted(request.inputs)}")
    missing = [name for name in ("source_uri", "s3_endpoint") if name not in request.facts]
    if missing:
        raise StageInputError(f"the request's facts lack {', '.join(missing)}, which say where the manifest's keys lie")
    return ObjectSource(
        request.inputs["manifest"],
        source_uri=request.facts["source_uri"],
        endpoint=request.facts["s3_endpoint"],
        connections=WORKERS,
    )


def _decode_all(source: Source, image_size: int) -> tuple[list[Row], list[RejectedRow]]:
    def read_and_decode(entry: Entry) -> Row | RejectedRow:
        return decode_row(entry, source.read(entry), prefix=source.prefix, image_size=image_size)

    rows: list[Row] = []
    rejected: list[RejectedRow] = []
    with counting("read and decoded", len(source.entries)) as counter:
        for decoded in map_in_order(read_and_decode, source.entries, workers=WORKERS):
            if isinstance(decoded, Row):
                rows.append(decoded)
            else:
                rejected.append(decoded)
            counter.done += 1
    return rows, rejected


def _check_usable(kept: Sequence[Row], rejected: Sequence[RejectedRow]) -> None:
    labels = {row.label for row in kept}
    if len(labels) < 2:
        reasons = dict(Counter(row.reason for row in rejected))
        raise StageInputError(
            f"pictures of at least two labels are needed, found {len(kept)} usable pictures of {len(labels)} labels; "
            f"kept aside: {reasons or 'none'}; expected <label>/<file> under the source"
        )
