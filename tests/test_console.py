"""What reaches the screen: texts made for a terminal, and plain ones everywhere else."""

import io
import logging
import os
import re
import termios
from pathlib import Path

import pytest

from conftest import SMALL, SMALL_STEPS, compose_config
from nvf.console import Screen
from nvf.train import train


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "environment", "expected"),
    [
        (Terminal, {"COLUMNS": "72"}, "= 72 True\n"),
        (Terminal, {"COLUMNS": "72", "NO_COLOR": "1"}, "= 72 False\n"),
        (Terminal, {"COLUMNS": "90", "NO_COLOR": "", "TERM": "dumb"}, "= 90 False\n"),
        (io.StringIO, {"COLUMNS": "72"}, "= plain\n"),
    ],
)
def test_a_terminal_gets_texts_of_its_width_and_a_file_plain_ones(
    stream: type[io.StringIO], environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    screen = Screen(stream())
    record = logging.makeLogRecord({"msg": "= %s", "args": ("plain",)})
    record.on_terminal = lambda *, width, colour: f"{width} {colour}"
    screen.emit(record)
    screen.emit(logging.makeLogRecord({"msg": "%d%%", "args": (7,)}))
    assert screen.stream.getvalue() == expected + "7%\n"


def test_bars_show_the_steps_on_a_terminal_and_leave_nothing_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose_config("cache=off", "dashboards=none", *SMALL, *SMALL_STEPS)
    master, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (40, 60))
    monkeypatch.setattr(Terminal, "fileno", lambda _: terminal)
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr("sys.stderr", stream)
        folder = tmp_path / type(stream).__name__
        folder.mkdir()
        train(config, folder, started=0.0)
        said = stream.getvalue()
        if not stream.isatty():
            assert said == ""
            break
        assert "\n" not in said
        assert "attention:" in said
        assert "/6 steps" in said
        assert re.search(r", val Top-1 \d+\.\d\r", said)  # complete, where a wide bar would have been cut
        assert [frame.strip() for frame in said.split("\r")[-2:]] == ["", ""]
    for descriptor in (master, terminal):
        os.close(descriptor)
