"""The durable DockerOperator on a real engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import pytest
from airflow.providers.docker.exceptions import DockerContainerFailedException, DockerContainerFailedSkipException
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowTaskTimeout
from docker.errors import NotFound

from airloom.flows.reap import reap
from airloom.hooks.docker_gpu import probe_gpus
from airloom.operators import stage_docker
from airloom.operators.stage_docker import StageDockerOperator
from tests.conftest import ROOT
from tests.docker.task_bench import DAG, RUN, TASK, Bench, Lines, Ti, execute, make_bench
from tests.fixtures.stage_image import BASE
from tests.fixtures.stage_repo import wait_until

bench = pytest.fixture(make_bench)

RESULT = ("import json, os, pathlib", "pathlib.Path('/airloom/result.json').write_text(json.dumps({'rows': 7}))")


def test_result_labels_and_what_is_left(bench: Bench) -> None:
    """A JSON result, from an image that is named by its id, as a user whom only the image knows; nothing is left."""
    image = bench.api.inspect_image(BASE)["Id"]
    ti = Ti(try_number=3)
    value, lines = bench.run(
        *RESULT, "print('done')", ti=ti, image=image, user="nobody", result_path="/airloom/result.json"
    )
    assert value == {"rows": 7}
    assert ti.pushed == {"image_digest": image}
    assert "done" in lines
    assert any(image in line for line in lines)
    assert bench.containers() == []


def test_labels_stand_before_the_start(bench: Bench) -> None:
    # From now on, however long the engine takes to listen.
    began = int(time.time())
    events = bench.api.events(since=began, decode=True, filters={"label": bench.label, "type": "container"})
    try:
        bench.run("pass", ti=Ti(try_number=2), labels={"team": "one", "airloom.task": "a lie"})
        first = next(events)
    finally:
        events.close()
    assert first["Action"] == "create"
    attributes = first["Actor"]["Attributes"]
    assert attributes["team"] == "one"
    assert {name: attributes[f"airloom.{name}"] for name in ("dag", "run", "task", "map_index", "try")} == {
        "dag": DAG, "run": RUN, "task": TASK, "map_index": "-1", "try": "2",
    }  # fmt: skip
    assert len(attributes["airloom.key"]) == 64


def test_last_line_where_there_is_no_result_file(bench: Bench) -> None:
    assert bench.run("print('one'); print('last')")[0] == "last"
    assert bench.run("print('one')", do_xcom_push=False)[0] is None


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("pass", "left no /airloom/result.json"),
        ("open('/airloom/result.json', 'w').write('{')", "is no JSON"),
        ("open('/airloom/result.json', 'wb').write(b'\\xff\\xfe\\xfa')", "is no JSON"),
        ("open('/airloom/result.json', 'w').write('1' * 2000)", "holds 2,000 bytes; at most 1,000"),
        ("import os; os.symlink('/etc/passwd', '/airloom/result.json')", "no plain file"),
        ("import os; os.mkdir('/airloom/result.json')", "no plain file|bytes; at most"),
    ],
)
def test_results_that_cannot_be_used(bench: Bench, program: str, said: str) -> None:
    with pytest.raises(AirflowFailException, match=said):
        bench.run(program, result_path="/airloom/result.json", result_max_bytes=1000)
    assert bench.containers() == []


def test_secrets_reach_the_program_and_no_configuration(bench: Bench) -> None:
    secret = "it's a $token\nof two lines"
    operator, lines = bench.task(
        "import hashlib, os, time",
        "print(hashlib.sha256(os.environ['TOKEN'].encode()).hexdigest(), os.path.exists('/airloom/environment.sh'))",
        "print('ready'); time.sleep(600)",
        private_environment={"TOKEN": secret},
        environment={"PLAIN": "seen"},
    )
    threading.Thread(target=lambda: _quietly(operator), daemon=True).start()
    wait_until(lambda: "ready" in lines, "the container's log")
    found = bench.facts()
    assert found is not None
    assert "a $token" not in json.dumps(found)
    assert "PLAIN=seen" in found["Config"]["Env"]
    import hashlib

    assert f"{hashlib.sha256(secret.encode()).hexdigest()} False" in lines
    bench.api.remove_container(bench.name, force=True)


def _quietly(operator: StageDockerOperator) -> None:
    with suppress(AirflowException):
        execute(operator)


def test_exit_codes(bench: Bench) -> None:
    with pytest.raises(DockerContainerFailedException, match="exit code 3 after"):
        bench.run("import sys; print('last words'); sys.exit(3)")
    with pytest.raises(DockerContainerFailedSkipException, match="99"):
        bench.run("import sys; sys.exit(99)", skip_on_exit_code=[98, 99])
    with pytest.raises(DockerContainerFailedException, match=r"could not be started.*no-such"):
        bench.run(command=["no-such-program"], init=False)
    with pytest.raises(DockerContainerFailedException, match=r"127.*cannot be started"):
        bench.run(command=["no-such-program"])
    assert bench.containers() == []


def test_out_of_memory_is_a_failure_though_its_main_program_ends_well(bench: Bench) -> None:
    """The process that holds too much is a child, whose end the main program does not mind."""
    with pytest.raises(AirflowFailException, match="more memory than its limit of 64 MiB") as caught:
        bench.run(
            "import subprocess, sys, time",
            "subprocess.run([sys.executable, '-c', 'held = bytearray(b\"x\") * (300 * 2**20)'])",
            # The engine hears of the kill and of the container's end apart; of the kill only where that comes first.
            "time.sleep(15)",
            mem_limit="64MiB",
        )
    assert "raise mem_limit" in str(caught.value)
    assert bench.containers() == []


def test_limits_are_the_engines(bench: Bench) -> None:
    operator, lines = bench.task(
        "import time; print('ready'); time.sleep(600)", mem_limit="64m", cpus=0.5, shm_size="8MiB"
    )
    threading.Thread(target=lambda: _quietly(operator), daemon=True).start()
    wait_until(lambda: "ready" in lines, "the container's log")
    found = bench.facts()
    assert found is not None
    host = found["HostConfig"]
    assert (host["Memory"], host["MemorySwap"], host["NanoCpus"], host["ShmSize"]) == (
        64 * 2**20, 64 * 2**20, 500_000_000, 8 * 2**20,
    )  # fmt: skip
    bench.api.remove_container(bench.name, force=True)


def test_gpus_that_are_not_there(bench: Bench) -> None:
    """The engine itself refuses, when the container is to start."""
    if probe_gpus(bench.api) is None:
        pytest.skip("this engine has GPUs")
    with pytest.raises(AirflowFailException, match=r"(?s)GPUs are needed, but .*runc\) said: could not") as caught:
        bench.run("pass", gpus=1)
    assert "install the NVIDIA container toolkit" in str(caught.value)
    assert "set gpus: 0" in str(caught.value)
    assert bench.containers() == []


def test_progress_bars_and_bytes_that_are_no_text_do_not_break_the_log(bench: Bench) -> None:
    value, lines = bench.run(
        "import sys",
        "out = sys.stdout.buffer",
        "for n in range(2000): out.write(b'\\r\\x1b[2K%d of it' % n)",
        "out.write(b'\\n\\xff\\xfe no text\\n' + b'x' * 100000 + b'\\n')",
        "print('the end')",
    )
    assert value == "the end"
    assert "1999 of it" in lines
    assert len([line for line in lines if line.endswith(" of it")]) < 20
    assert "\ufffd\ufffd no text" in lines
    assert sum(len(line) for line in lines if set(line) == {"x"}) == 100000
    assert not [line for line in lines if "\x1b" in line]


WORKER = """
import sys
from types import SimpleNamespace
from tests.docker import task_bench as module
from tests.docker.test_stage_docker_operator import COUNT
from airloom.settings import Settings
settings = Settings.model_validate_json(sys.stdin.readline())
module.stage_docker.get_settings = module.wanted.get_settings = lambda: settings
bench = module.Bench(settings)
class Shown(module.Lines):
    def info(self, text, *values):
        print(text % values if values else text, flush=True)
operator, _ = bench.task(COUNT)
operator.lines = Shown()
module.execute(operator)
"""
# Stops half-way, until it is let go.
COUNT = """
import os, time
for n in range(30):
    print('line', n)
    time.sleep(0.1)
    while n == 10 and not os.path.exists('/tmp/go'):
        time.sleep(0.02)
"""


def let_go(bench: Bench) -> None:
    bench.api.exec_start(bench.api.exec_create(bench.name, ["touch", "/tmp/go"])["Id"])


def count(bench: Bench, *, until: str, ti: Ti, **changes: Any) -> tuple[Any, Lines]:
    """Run COUNT, which is let go when a line with this text has come."""
    operator, lines = bench.task(COUNT, **changes)

    def watch() -> None:
        wait_until(lambda: any(until in line for line in list(lines)), until)
        let_go(bench)

    threading.Thread(target=watch, daemon=True).start()
    return execute(operator, ti), lines


def killed_worker(bench: Bench, *, after: str) -> None:
    """Start a worker, and SIGKILL it when it has shown a line."""
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(bench.settings.model_dump_json() + "\n")
    worker.stdin.flush()
    try:
        for line in worker.stdout:
            if line.strip() == after:
                break
        else:
            pytest.fail("the worker has ended by itself")
    finally:
        worker.kill()
        worker.wait()


def test_a_killed_workers_container_is_adopted(bench: Bench) -> None:
    killed_worker(bench, after="line 2")
    before = bench.facts()
    assert before is not None
    assert before["State"]["Running"]
    ti = Ti(try_number=2)
    value, lines = count(bench, until="adopting container", ti=ti)
    assert value == "line 29"
    assert [line for line in lines if line.startswith("line ")] == [f"line {n}" for n in range(30)]
    assert any(f"adopting container {before['Id'][:12]}, which try 1 started" in line for line in lines)
    assert bench.containers() == []


def test_the_result_of_one_that_ended_meanwhile_is_taken_once(bench: Bench) -> None:
    killed_worker(bench, after="line 2")
    let_go(bench)
    wait_until(lambda: not bench.runs(), "the container's end")
    value, lines = bench.run(COUNT, ti=Ti(try_number=2), auto_remove="never")
    assert value == "line 29"
    assert any("has ended meanwhile: taking its result" in line for line in lines)
    assert not any(line.startswith("started container") for line in lines)
    kept = bench.containers()
    assert len(kept) == 1
    assert bench.facts() is None, "its name is free"
    # Cleared by somebody: it runs again.
    again, lines = count(bench, until="line 10", ti=Ti(try_number=3))
    assert again == "line 29"
    assert any(line.startswith("started container") for line in lines)
    assert [found["Id"] for found in bench.containers()] == [found["Id"] for found in kept]


def test_a_running_container_of_other_work_is_ended(bench: Bench) -> None:
    killed_worker(bench, after="line 2")
    before = bench.facts()
    assert before is not None
    value, lines = bench.run("print('other')", ti=Ti(try_number=2))
    assert value == "other"
    assert any("is running and no use to this try: removing it" in line for line in lines)
    with pytest.raises(NotFound):
        bench.api.inspect_container(before["Id"])


def test_somebody_elses_container_stays(bench: Bench) -> None:
    name = f"{bench.name}-other"
    made = bench.api.create_container(
        BASE, command="true", name=name, labels={bench.label.split("=")[0]: bench.label.split("=")[1]}
    )
    with pytest.raises(AirflowFailException, match=f"{name} is not of this task"):
        bench.run("pass", container_name=name)
    assert bench.api.inspect_container(made["Id"])["State"]["Status"] == "created"


def test_removed_by_hand(bench: Bench) -> None:
    operator, lines = bench.task("import time; print('ready'); time.sleep(600)")
    errors: list[BaseException] = []

    def go() -> None:
        try:
            execute(operator)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=go)
    thread.start()
    wait_until(lambda: "ready" in lines, "the container's log")
    bench.api.remove_container(bench.name, force=True)
    thread.join(300)
    (error,) = errors
    # Who looks between the kill and the removal sees the kill.
    assert "was removed while it ran" in str(error) or "signal 9" in str(error)
    assert isinstance(error, DockerContainerFailedException), "another try may help"
    assert bench.containers() == []


@pytest.mark.parametrize("still_wanted", [False, True])
def test_told_to_end(bench: Bench, monkeypatch: pytest.MonkeyPatch, still_wanted: bool) -> None:
    """Stopped where nobody wants it any more; left to the next try where Airflow alone lost its worker."""
    monkeypatch.setattr(stage_docker, "is_wanted", lambda ti: still_wanted)
    operator, lines = bench.task("import time; print('ready'); time.sleep(600)")
    stopper = threading.Thread(
        target=lambda: (wait_until(lambda: "ready" in lines, "the log"), operator.on_kill()), daemon=True
    )
    stopper.start()
    with pytest.raises(AirflowException, match="the next try adopts it" if still_wanted else "as Airflow asked"):
        execute(operator)
    assert bench.runs() is still_wanted
    assert len(bench.containers()) == int(still_wanted)


def test_on_kill_after_a_timeout(bench: Bench) -> None:
    """Airflow raises inside `execute` and calls `on_kill` afterwards; a program that answers with 0 was stopped too."""
    operator, lines = bench.task(
        "import signal, sys, time",
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))",
        "print('ready'); time.sleep(600)",
    )

    def timeout(*_: object) -> None:
        raise AirflowTaskTimeout

    def alarm() -> None:
        wait_until(lambda: "ready" in lines, "the container's log")
        os.kill(os.getpid(), signal.SIGALRM)

    before = signal.signal(signal.SIGALRM, timeout)
    threading.Thread(target=alarm, daemon=True).start()
    try:
        with pytest.raises(AirflowTaskTimeout):
            execute(operator)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert bench.runs()
    operator.on_kill()
    assert bench.containers() == []


def test_reaper_ends_what_no_live_run_owns(bench: Bench) -> None:
    killed_worker(bench, after="line 2")
    bench.run("print('kept')", ti=Ti(map_index=4), auto_remove="never")
    asked: list[tuple[str, str]] = []

    def is_live(dag: str, run: str) -> bool:
        asked.append((dag, run))
        return True

    assert reap(bench.settings, is_live=is_live) == []
    assert asked == [(DAG, RUN)] * 2
    ended = reap(bench.settings, is_live=lambda dag, run: False)
    assert {(found.pipeline, found.run_id, found.stage) for found in ended} == {(DAG, RUN, TASK)}
    assert len(ended) == 2
    assert bench.containers() == []
