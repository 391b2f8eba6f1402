"""The detectors of a project."""

from __future__ import annotations

import pytest

from simdetr.app.database import writing
from simdetr.app.detectors_at_hand import all_at_hand, at_hand, files_of
from simdetr.app.image_list import project_of
from simdetr.app.refusals import Refusal
from simdetr.app.tables import Run, RunKind, RunState


def test_those_of_finished_trainings_and_the_one_to_start_from(serve, small_detector):
    person = serve(run=small_detector)
    with writing(person.desk.engine) as session:
        runs = [Run(project_id=1, kind=RunKind.TRAIN, state=state) for state in (RunState.DONE, RunState.FAILED)]
        session.add_all(runs)
        session.flush()
        for run in runs:
            folder = files_of(person.settings, 1, run.id).training
            folder.mkdir(parents=True)
            (folder / "detector").symlink_to(small_detector)
        project = project_of(session, 1)
        found = all_at_hand(session, person.settings, project)
        assert [model.id for model in found] == [f"run-{runs[0].id}", "start"]
        assert found[1].classes() == ["disc", "square"]
        assert at_hand(session, person.settings, project, None).id == "start"
        assert at_hand(session, person.settings, project, f"run-{runs[0].id}").run is runs[0]
        with pytest.raises(Refusal, match="there is no detector run-99"):
            at_hand(session, person.settings, project, "run-99")


def test_none_is_said_so(person):
    with writing(person.desk.engine) as session:
        project = project_of(session, 1)
        with pytest.raises(Refusal, match="there is no detector yet"):
            at_hand(session, person.settings, project, None)
        with pytest.raises(Refusal, match="without --run"):
            at_hand(session, person.settings, project, "start")
