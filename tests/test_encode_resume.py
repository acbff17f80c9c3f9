"""Encoding that is killed, damaged or shared: the same files in the end."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from encode_toys import Tokenizer, assert_same, assert_same_files, encode, episode
from forked import Program


def test_a_killed_job_continues_and_gives_the_same_records(tmp_path):
    episodes = [episode(i) for i in range(5)]
    whole = encode(episodes, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        encode(episodes, tmp_path / "killed", tokenizer=Tokenizer(fail_at=6))
    assert not (tmp_path / "killed" / "manifest.json").exists()
    # What SIGKILL can leave behind: half a file, and a whole one that was not yet accounted for.
    (tmp_path / "killed" / "shard_00001.arrayrecord.partial").write_bytes(b"half")
    (tmp_path / "killed" / "shard_00002.arrayrecord").write_bytes(b"stale")
    rest = Tokenizer()
    resumed = encode(episodes, tmp_path / "killed", tokenizer=rest)
    assert rest.calls == 6  # the second and third shard: 60 and 30 windows
    assert_same(whole, resumed)
    again = Tokenizer()
    assert_same(whole, encode(episodes, tmp_path / "killed", tokenizer=again))
    assert again.calls == 0
    assert not list((tmp_path / "killed").glob("*.partial"))


def test_a_deleted_shard_is_made_again(tmp_path):
    episodes = [episode(i) for i in range(5)]
    first = encode(episodes, tmp_path / "a")
    encode(episodes, tmp_path / "b")
    (tmp_path / "b" / "shard_00001.arrayrecord").unlink()
    some = Tokenizer()
    assert_same(first, encode(episodes, tmp_path / "b", tokenizer=some))
    assert some.calls == 4
    assert_same_files(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("first", [0, 1])
def test_a_deleted_shard_is_made_again_by_its_process_whichever_comes_first(tmp_path, first):
    """None takes the manifest that is there for the new one, nor waits for one that did."""
    episodes = [episode(i) for i in range(5)]
    whole = encode(episodes, tmp_path / "a")
    encode(episodes, tmp_path / "b")
    (tmp_path / "b" / "shard_00001.npz").unlink()  # of process 1

    def work(process):
        return encode([episode(i) for i in range(5)], tmp_path / "b", process=process, processes=2)

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(work, first)
        time.sleep(0.3)
        for records in (pool.submit(work, 1 - first).result(20), one.result(20)):
            assert_same(whole, records)
    assert_same_files(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_work_and_leave_the_same_files(tmp_path, processes):
    episodes = [episode(i) for i in range(9)]
    whole, tokenizers = encode(episodes, tmp_path / "one"), [Tokenizer() for _ in range(processes)]

    def work(process):
        return encode(
            [episode(i) for i in range(9)],
            tmp_path / "many",
            tokenizer=tokenizers[process],
            process=process,
            processes=processes,
        )

    with ThreadPoolExecutor(processes) as pool:
        for records in pool.map(work, range(processes)):
            assert_same(whole, records)
    assert_same_files(tmp_path / "one", tmp_path / "many")
    once = Tokenizer()
    encode(episodes, tmp_path / "again", tokenizer=once)
    assert all(t.calls for t in tokenizers) and sum(t.calls for t in tokenizers) == once.calls


def test_another_number_of_processes_goes_on(tmp_path):
    episodes = [episode(i) for i in range(8)]
    encode(episodes, tmp_path / "one")
    for process, calls in ((0, 5), (2, 2)):  # killed; the second of them has not even begun
        with pytest.raises(KeyboardInterrupt):
            encode(
                episodes,
                tmp_path / "many",
                tokenizer=Tokenizer(fail_at=calls),
                process=process,
                processes=3,
            )
    rest = Tokenizer()
    encode(episodes, tmp_path / "many", tokenizer=rest)
    assert_same_files(tmp_path / "one", tmp_path / "many")
    assert rest.calls == 12  # one of four shards was finished


def test_killed_anywhere_and_resumed_gives_the_same_bytes(tmp_path):
    """A real process and SIGKILL, at moments that the clock chooses; it waits for a late one."""
    for seen in ("shard_00000.npz", "shard_00002.arrayrecord.partial", "shard_00003.npz"):
        with Program("encode_toys", tmp_path / "killed", seen) as process:
            while not (tmp_path / "killed" / seen).exists():
                assert process.poll() is None, process.err
                time.sleep(0.002)
    assert not (tmp_path / "killed" / "manifest.json").exists()
    for name in ("whole", "killed"):
        encode([episode(i) for i in range(12)], tmp_path / name)
    assert_same_files(tmp_path / "whole", tmp_path / "killed")
