"""``python -m psfast.plots``: reading what a run logged, drawing it."""

import pytest

from psfast import plots

HEADER = "accepted,evaluations,evaluations_per_second,radius,train_loss,val_loss,val_accuracy\n"
ROWS = (
    "0,100,50,0.1,4.5,,\n" + ",,,,,4.0,0.25\n" + "12,300,100,0.1,nan,,\n" + "3,400,100,0.1,3.5,,\n"
)


@pytest.fixture
def run(tmp_path):
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "metrics.csv").write_text(HEADER + ROWS)
    return tmp_path


def test_curves_share_the_trial_points_and_seconds_of_their_step(run):
    curves = plots.read_curves(plots.find_metrics(run))
    assert curves["train_loss"] == ([100.0, 400.0], [2.0, 5.0], [4.5, 3.5])
    assert curves["val_accuracy"] == ([100.0], [2.0], [0.25])
    assert curves["accepted"].values == [0.0, 12.0, 3.0]


@pytest.mark.parametrize("of", ["folder", "file"])
def test_the_command_writes_a_png(run, of, capsys):
    pytest.importorskip("matplotlib")
    plots.main([str(run if of == "folder" else run / "csv" / "metrics.csv")])
    path = run / "plot.png" if of == "folder" else run / "csv" / "plot.png"
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert capsys.readouterr().out.strip() == str(path)


def test_acceptance_by_tensor_is_a_panel_of_its_own(run):
    pytest.importorskip("matplotlib")
    path = run / "csv" / "metrics.csv"
    rows = [
        f"{row},{extra}" for row, extra in zip(ROWS.split(), ["", "", ",", "7,3"], strict=False)
    ]
    path.write_text(HEADER.strip() + ",accepted/head.weight,accepted/head.bias\n" + "\n".join(rows))
    curves = plots.read_curves(path)
    assert curves["accepted/head.weight"] == ([400.0], [5.0], [7.0])
    assert len(plots.draw(curves).axes) == 2 * 5


def test_a_panel_without_values_is_left_out(run):
    pytest.importorskip("matplotlib")
    curves = plots.read_curves(plots.find_metrics(run))
    del curves["val_accuracy"]
    assert len(plots.draw(curves).axes) == 2 * 3


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda path: None, "logger=none"),
        (lambda path: path.rmdir(), "there is no /"),
        (lambda path: (path / "metrics.csv").write_text("step,loss\n1,2\n"), "'evaluations'"),
        (lambda path: (path / "metrics.csv").write_text(""), "'evaluations'"),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(tmp_path, write, message):
    write(tmp_path)
    with pytest.raises(SystemExit, match=message):
        plots.main([str(tmp_path)])


def test_a_place_that_cannot_be_written_is_refused_in_one_line(run):
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit, match="psfast.plots: error: .*/nope/x.png"):
        plots.main([str(run), "--out", str(run / "nope/x.png")])


def test_several_runs_are_refused(run):
    (run / "metrics.csv").write_text(HEADER)
    with pytest.raises(SystemExit, match="several"):
        plots.main([str(run)])
