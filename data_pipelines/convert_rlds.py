"""Turn an RLDS dataset kept as TFRecord into ArrayRecord, without TensorFlow.

    python -m data_pipelines.convert_rlds /data/bridge_dataset/1.0.0 /data/bridge_array/1.0.0

Training does not need it: `sources/rlds.py` reads TFRecord at random too. Convert to check a whole
download at once (every checksum is verified), to have the index inside the files, which spares a
seek per episode on network storage, or to read the dataset with Grain or with
`tfds.builder_from_directory(...).as_data_source()`, which cannot read TFRecord at random.

Records are copied byte by byte: pictures are not decoded, and files keep their order and numbers.
A conversion that was stopped goes on when the same command is given again.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from array_record.python import array_record_module
from tqdm import tqdm

from data_pipelines.sources.rlds import (
    INFO,
    PreparedFolder,
    open_folder,
    read_features,
    read_index,
    read_record,
)

PLAN = "conversion.json"  # of what, and what was left out


def convert_rlds(source: Path, out: Path, leave_out_damaged: bool = False) -> PreparedFolder:
    """Convert a prepared folder, or what is left of it.

    Args:
        source: `<name>/<version>` with .tfrecord files.
        out: the folder to make; its `dataset_info.json` appears when everything is there.
        leave_out_damaged: go on without damaged records; each is printed, and `conversion.json`
            counts them by file. Otherwise whole files are converted, and then it fails.

    Returns:
        The new folder.

    Raises:
        ValueError: if the source cannot be converted or has damaged records, or the folder holds
            something else.
        OSError: if the folder cannot be written or the disk is full.
    """
    folder, out = open_folder(source), Path(out)
    if folder.file_format != "tfrecord":
        raise ValueError(f"{folder.path} is kept as {folder.file_format} already; use it as it is")
    read_features(folder.path)
    _begin(folder, out)
    if (out / INFO).exists():
        return open_folder(out)
    target = PreparedFolder(out, {**folder.info, "fileFormat": "array_record"})
    jobs = [
        job
        for name, files in folder.splits.items()
        for job in zip(files.files, files.lengths, target.splits[name].files)
    ]
    faults = []
    for path, length, result in tqdm(jobs, desc=f"convert {folder.name}", unit="file"):
        if result.exists() and (leave_out_damaged or _count(result) == length):
            continue
        found = _convert_file(path, length, result, leave_out_damaged)
        for fault in found:
            tqdm.write(f"damaged: {fault}", file=sys.stderr)
        faults += found
    if faults and not leave_out_damaged:
        raise ValueError(
            f"{folder.path} has {len(faults)} faults, the first: {faults[0]}. Repeat the command "
            "once the files are whole, or with --leave-out-damaged to go on without these records"
        )
    _finish(folder, target)
    return open_folder(out)


def _begin(folder: PreparedFolder, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if (out / PLAN).exists():
        if json.loads((out / PLAN).read_text(encoding="utf-8"))["source"] != folder.info:
            raise ValueError(f"{out} was begun from another dataset; choose an empty folder")
    elif any(out.iterdir()):
        raise ValueError(f"{out} holds other files; choose an empty folder")
    else:
        _write_json(out / PLAN, {"source": folder.info})
    records = {path.name for files in folder.splits.values() for path in files.files}
    for path in folder.path.iterdir():  # features, labels, a license
        if path.is_file() and path.name not in {*records, INFO, PLAN}:
            shutil.copyfile(path, out / path.name)


def _convert_file(path: Path, length: int, result: Path, leave_out: bool) -> list[str]:
    """Copies a file's records; says what is wrong with it, and then makes none unless told to."""
    if not path.is_file():
        faults, numbers = [f"{path} is missing"], []
    else:
        index = read_index(path)
        faults, numbers = [], range(length)
        if len(index.starts) > length:
            faults = [f"{path} has {len(index.starts)} records, but {INFO} says {length}"]
    partial = result.with_name(result.name + ".partial")
    # One record per group, as TFDS writes them; pictures are compressed already.
    writer = array_record_module.ArrayRecordWriter(str(partial), "group_size:1,uncompressed")
    try:
        for number in numbers:
            try:
                writer.write(read_record(path, index, number))
            except ValueError as error:
                faults.append(str(error))
    finally:
        writer.close()
    if faults and not leave_out:
        partial.unlink()
    else:
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, result)
    return faults


def _finish(folder: PreparedFolder, target: PreparedFolder) -> None:
    """Writes how many records each file has, the plan's end, and last what makes it a dataset."""
    rows, left_out = [], {}
    for row in target.info["splits"]:
        files = target.splits[row["name"]]
        counts = [_count(path) for path in files.files]
        for path, before, now in zip(files.files, files.lengths, counts):
            if now < before:
                left_out[path.name] = before - now
        rows.append({**row, "shardLengths": [str(count) for count in counts]})
    _write_json(target.path / PLAN, {"source": folder.info, "left_out": left_out})
    _write_json(target.path / INFO, {**target.info, "splits": rows})


def _count(path: Path) -> int:
    reader = array_record_module.ArrayRecordReader(str(path), "readahead_buffer_size:0")
    try:
        return reader.num_records()
    finally:
        reader.close()


def _write_json(path: Path, content: dict) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2), encoding="utf-8")
    os.replace(partial, path)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="data_pipelines.convert_rlds",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="<name>/<version> with .tfrecord files")
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--leave-out-damaged", action="store_true", help="go on without them")
    args = parser.parse_args()
    try:
        folder = convert_rlds(args.source, args.out, args.leave_out_damaged)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    counts = ", ".join(f"{name}: {len(files)} episodes" for name, files in folder.splits.items())
    print(f"{folder.path} is complete ({counts})")


if __name__ == "__main__":
    main()
