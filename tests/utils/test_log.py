"""Messages of the package beside those of the program that calls it."""

import logging
import sys

import pytest

from hyspark.tasks.python_words import in_python_words
from hyspark.utils.log import LOG, set_up_log


def start_program(monkeypatch):
    """Give the loggers the state in which a program starts, without the handlers of pytest."""
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(LOG, "handlers", [])
    LOG.setLevel(logging.NOTSET)


@in_python_words
def work():
    LOG.info("one message")


def test_a_program_without_handlers_sees_messages(monkeypatch, capsys):
    start_program(monkeypatch)
    work()
    work()
    assert capsys.readouterr().err == "one message\n" * 2
    assert logging.root.handlers == []  # logging.basicConfig of the program still has its effect


@pytest.mark.parametrize("name", [None, "hyspark"])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_program_with_a_handler_sees_messages_there_alone(monkeypatch, capsys, name, is_first):
    start_program(monkeypatch)
    handler = logging.StreamHandler(sys.stdout)
    if not is_first:
        work()
        assert capsys.readouterr().err == "one message\n"
    logging.getLogger(name).addHandler(handler)
    work()
    assert tuple(capsys.readouterr()) == ("one message\n", "")


def test_a_level_that_a_program_has_set_stays(monkeypatch, capsys):
    start_program(monkeypatch)
    LOG.setLevel(logging.WARNING)
    work()
    assert (LOG.level, capsys.readouterr().err) == (logging.WARNING, "")
    set_up_log()  # of a command
    assert LOG.level == logging.INFO
