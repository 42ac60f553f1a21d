"""Inspected models: the report, packed folders, files, pictures and the command."""

import csv
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from solver_steps import STEPS

import singlequant as sq
from singlequant import _C, files
from singlequant.cli.main import main
from singlequant.config import QuantConfig
from singlequant.methods.gain import alignment_gain, balance_gain
from singlequant.study import inspect as outliers
from singlequant.study.inspect import Inspection, inspect_model
from singlequant.study.inspect.run import _cells as cells_of

F32 = np.float32


@pytest.fixture(scope="module")
def inspection():
    """The bundled model under three methods, on few tokens."""
    config = QuantConfig("w4a4", bits=4, calibration_tokens=512)
    return inspect_model(sq.bundled_model(), ["singlequant", "paper", "hadamard"], config=config,
                         surface=True)


# ---- a model ------------------------------------------------------------------------------------


def test_hadamard_lowers_peak_and_kurtosis(inspection):
    """At the sites with outlier channels; the mixed inputs of o_proj have none to begin with."""
    before = inspection.select(method="hadamard", step=0)
    after = inspection.select(method="hadamard", final=True)
    assert len(before) == len(after) == 5 * 4
    for a, b in zip(before, after, strict=True):
        assert (a.layer, a.site) == (b.layer, b.site)
        if a.site != "o":
            assert b.peak < a.peak / 3
            assert b.kurtosis < a.kurtosis / 3
            assert b.utilization > 1.5 * a.utilization
            assert b.activation_error < a.activation_error / 2
            assert b.output_error < a.output_error


def test_rows_are_whole_and_in_order(inspection):
    for name in inspection.methods:
        rows = inspection.select(method=name, layer=3, site="down")
        assert [row.step for row in rows] == list(range(len(rows)))
        assert [row.final for row in rows] == [False] * (len(rows) - 1) + [True]
        names = [row.name for row in rows if row.name != "ART, axis 2"]
        assert names == STEPS[name]
    assert {row.tokens for row in inspection.rows} == {512}
    assert {row.channels for row in inspection.select(site="down")} == {448}


def test_original_is_the_same_under_every_method(inspection):
    figures = [[vars(r) | {"method": ""} for r in inspection.select(method=m, step=0)]
               for m in inspection.methods]
    assert figures[0] == figures[1] == figures[2]


def test_inspection_is_deterministic(inspection, model, text):
    config = QuantConfig("w4a4", bits=4, calibration_tokens=64)
    results = []
    for threads in (1, 3):
        _C.set_num_threads(threads)
        results.append(inspect_model(model, ["paper", "singlequant"], calibration=text,
                                     config=config))
    assert results[0].to_csv() == results[1].to_csv()
    assert results[0] == results[1]


def test_inspection_of_one_layer_is_part_of_the_whole(inspection):
    part = inspect_model(sq.bundled_model(), ["hadamard"], layer=2, site="gate_up",
                         config=QuantConfig("w4a4", bits=4, calibration_tokens=512))
    assert list(part.rows) == inspection.select(method="hadamard", layer=2, site="gate_up")


def test_gains_are_of_the_site_and_the_same_in_all_its_rows(inspection):
    checkpoint = sq.load_checkpoint(sq.bundled_model())
    windows = sq.calibration_windows(checkpoint, QuantConfig(calibration_tokens=512))
    for layer in sq.calibrate(checkpoint, windows):
        for site, statistics in layer.sites.items():
            found = {(row.balance_gain, row.alignment_gain)
                     for row in inspection.select(layer=layer.index, site=site)}
            assert found == {(balance_gain(statistics), alignment_gain(statistics))}


def test_gains_stand_in_the_lines_of_the_original(inspection):
    row = replace(inspection.rows[0], balance_gain=None, alignment_gain=1.234)
    heading, original, *others = outliers.site_table(
        replace(inspection, rows=(row, *inspection.rows[1:]))).splitlines()
    assert heading.endswith("balance dB   align dB")
    assert original.split()[-2:] == ["-", "1.23"]
    gains = [f"{row.alignment_gain:.2f}" for row in inspection.select(step=0, method="paper")]
    lines = [line for line in others if line.split()[2] == "original"]
    assert [line.split()[-1] for line in lines] == gains[1:]
    assert all(len(line) == len(heading) for line in lines)


def test_surface_is_of_the_worst_site(inspection):
    surface = inspection.surface
    worst = max(inspection.select(step=0), key=lambda row: row.peak)
    assert (surface.layer, surface.site) == (worst.layer, worst.site)
    names = [name for name, _ in surface.panels]
    assert names == ["original", *inspection.methods]
    assert all(cells.shape == (64, 128) for _, cells in surface.panels)
    peaks = [cells.max() for _, cells in surface.panels]
    assert peaks[0] > 2 * max(peaks[1:])


def test_cells_keep_the_largest():
    x = np.zeros((513, 300), F32)
    x[512, 299], x[0, 0] = -9, 4
    cells = cells_of(x)
    assert cells.shape == (64, 128)
    assert cells[-1, -1] == 9
    assert cells[0, 0] == 4
    assert np.count_nonzero(cells) == 2
    assert cells_of(np.ones((1, 2), F32)).shape == (1, 2)


# ---- packed folders -----------------------------------------------------------------------------


@pytest.fixture
def packed(model, text, tmp_path):
    """(the original, its packed folder)."""
    config = QuantConfig("w4a4", bits=4, method="singlequant", calibration_tokens=64, weights="rtn",
                         calibration_bits=32)  # as `inspect` calibrates
    sq.quantize_folder(model, tmp_path / "out", config, text)
    return model, tmp_path / "out"


def test_packed_folder_shows_what_is_stored(packed, text):
    model, out = packed
    stored = inspect_model(out, original=model, calibration=text)
    solved = inspect_model(model, ["singlequant"], calibration=text,
                           config=QuantConfig("w4a4", bits=4, calibration_tokens=64, weights="rtn"))
    assert stored.methods == ("singlequant",)
    assert stored.calibration_tokens == 64
    assert [row.name for row in stored.rows[:3]] == ["original", "final", "original"]
    for a, b in zip(stored.select(final=True), solved.select(final=True), strict=True):
        assert (a.layer, a.site) == (b.layer, b.site)
        for name in outliers.FIGURE_FIELDS:
            assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-3, abs=1e-6), name
    assert stored.select(step=0)[0].peak == solved.select(step=0)[0].peak


def test_stored_codes_are_what_is_measured(packed, text):
    """Scales written ten times too large must show in the output error, and there alone."""
    from safetensors.numpy import load_file, save_file

    model, out = packed
    before = inspect_model(out, original=model, calibration=text, layer=0, site="down")
    path = next(out.glob("*.safetensors"))
    tensors = load_file(path)
    tensors["model.layers.0.mlp.down_proj.weight_scale"] *= F32(10)
    save_file(tensors, path, {"format": "pt"})
    after = inspect_model(out, original=model, calibration=text, layer=0, site="down")
    assert after.rows[-1].output_error > 10 > before.rows[-1].output_error
    assert after.rows[-1].activation_error == before.rows[-1].activation_error
    assert after.rows[:-1] == before.rows[:-1]


def test_packed_folder_without_rotations_shows_the_original(model, text, tmp_path):
    config = QuantConfig("w4a4", bits=4, calibration_tokens=64, method="none")
    sq.quantize_folder(model, tmp_path / "out", config, text)
    found = inspect_model(tmp_path / "out", original=model, calibration=text)
    assert {(row.name, row.final) for row in found.rows} == {("original", True)}


@pytest.mark.parametrize(("change", "message"), [
    (lambda model, out: {"model": out}, "original: expected the model"),
    (lambda model, out: {"model": model, "original": model}, "original: expected with a packed"),
    (lambda model, out: {"model": out, "original": out}, "original: expected an unquantized"),
    (lambda model, out: {"model": out, "original": sq.bundled_model()},
     "original: expected the model that .* found another"),
    (lambda model, out: {"model": out, "original": model, "methods": ["paper"]},
     "methods: expected none with a packed folder"),
    (lambda model, out: {"model": model, "methods": ["spin"]}, "methods: .* found 'spin'"),
    (lambda model, out: {"model": model, "layer": 2}, "layer: expected 0 to 1, found 2"),
    (lambda model, out: {"model": model, "layer": -1}, "layer: expected 0 to 1, found -1"),
    (lambda model, out: {"model": model, "site": "v"}, "site: expected one of qkv.* found 'v'"),
    (lambda model, out: {"model": model, "config": QuantConfig(bits=4, scheme="w4a16")},
     "scheme: expected w4a4 or w4a8"),
    (lambda model, out: {"model": model, "config": QuantConfig(group_size=128)}, "group_size"),
    (lambda model, out: {"model": model, "massive": [0.0]}, "massive"),
])
def test_inspect_model_rejects_bad_input(packed, text, change, message):
    with pytest.raises(ValueError, match=message):
        inspect_model(**{"calibration": text, **change(*packed)})


# ---- files and pictures -------------------------------------------------------------------------


def test_json_round_trip(inspection):
    text = json.dumps(inspection.to_json(), allow_nan=False)
    assert Inspection.from_json(json.loads(text)) == inspection
    with pytest.raises(ValueError, match="inspection: expected"):
        Inspection.from_json({"rows": []})


def test_csv_round_trip(inspection):
    rows = list(csv.DictReader(io.StringIO(inspection.to_csv())))
    assert len(rows) == len(inspection.rows)
    for text, row in zip(rows, inspection.rows, strict=True):
        assert (int(text["layer"]), text["site"], text["method"], text["name"]) == (
            row.layer, row.site, row.method, row.name)
        assert [int(text["massive_100"]), int(text["massive_1000"])] == list(row.massive)
        for name in outliers.FIGURE_FIELDS:
            assert float(text[name]) == getattr(row, name)
        for name in outliers.GAIN_FIELDS:
            assert float(text[name]) == getattr(row, name)


def test_repr_is_short(inspection):
    assert repr(inspection) == ("Inspection('stdlib-llama', singlequant, paper, hadamard, "
                                f"20 sites, {len(inspection.rows)} rows, 4 bits)")


def test_plots_show_the_rows(inspection):
    pytest.importorskip("matplotlib")
    heat = outliers.plot_heatmaps(inspection)
    panels = [axis for axis in heat.axes if axis.get_images()]
    assert [axis.get_title() for axis in panels] == ["original", *inspection.methods]
    image = np.asarray(panels[1].get_images()[0].get_array())
    assert image.shape == (5, 4)
    assert image[2, 3] == inspection.select(
        layer=2, site="down", method="singlequant", final=True)[0].peak
    assert len({axis.get_images()[0].norm.vmax for axis in panels}) == 1
    bars = outliers.plot_errors(inspection, "activation_error").axes[0]
    heights = [bar.get_height() for bar in bars.patches]
    assert len(heights) == 4 * 4
    mean = np.mean([row.activation_error for row in inspection.select(
        site="qkv", step=0, method="paper")])
    assert heights[0] == pytest.approx(mean)
    surface = outliers.plot_surface(inspection)
    assert len({axis.get_zlim() for axis in surface.axes}) == 1
    with pytest.raises(ValueError, match="field: expected one of"):
        outliers.plot_heatmaps(inspection, "rms")


def test_surface_asks_for_what_is_missing(model, text):
    found = inspect_model(model, ["none"], calibration=text, layer=0,
                          config=QuantConfig("w4a4", bits=4, calibration_tokens=64))
    with pytest.raises(ValueError, match="surface=True"):
        outliers.plot_surface(found)


def test_pictures_of_a_single_token_are_drawn(model, text, tmp_path):
    pytest.importorskip("matplotlib")
    found = inspect_model(model, ["none"], calibration=text, surface=True, layer=0, site="o",
                          config=QuantConfig("w4a4", bits=4, calibration_tokens=1))
    files.save_figure(outliers.plot_surface(found), tmp_path / "a.png")
    files.save_figure(outliers.plot_overview(found), tmp_path / "b.svg")
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file() and p != text) == [
        "a.png", "b.svg"]


def test_files_appear_only_when_whole(tmp_path):
    class Broken:
        def savefig(self, file, dpi, format):
            file.write(b"half")
            raise OSError("disk full")

    path = tmp_path / "picture.png"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="disk full"):
        files.save_figure(Broken(), path)
    assert [p.name for p in tmp_path.iterdir()] == ["picture.png"]
    assert path.read_bytes() == b"old"


# ---- the command --------------------------------------------------------------------------------


def test_command_prints_both_tables(model, text, capsys):
    assert main(["inspect", str(model), "--calibration", str(text), "--calibration-tokens", "64",
                 "--method", "paper", "hadamard"]) == 0
    printed = capsys.readouterr().out
    for name in ("original", "paper", "hadamard", "URT, axis 2", "Hadamard, both axes", "MO>1000",
                 "8-bit activations, clip 1"):
        assert name in printed
    assert sum(line.startswith("    1 down") for line in printed.splitlines()) == 3


def test_command_writes_files_and_json(model, text, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    files = [tmp_path / name for name in ("p.png", "s.png", "t.csv")]
    assert main(["inspect", str(model), "--calibration", str(text), "--calibration-tokens", "64",
                 "--scheme", "w4a8", "--layer", "1", "--site", "down", "--massive", "5",
                 "--normal", "2", "--picture", str(files[0]), "--surface", str(files[1]),
                 "--csv", str(files[2]), "--json"]) == 0
    found = Inspection.from_json(json.loads(capsys.readouterr().out))
    assert found.bits == 8
    assert found.clip == 1.0
    assert found.massive == (5.0,)
    assert found.normal == 2.0
    assert {(row.layer, row.site) for row in found.rows} == {(1, "down")}
    assert files[2].read_text() == found.to_csv()
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files[:2])


def test_command_reads_a_packed_folder(packed, text, capsys):
    model, out = packed
    assert main(["inspect", str(out), "--original", str(model), "--calibration", str(text)]) == 0
    printed = capsys.readouterr().out
    assert "weights rtn" in printed
    assert "final" in printed
    assert main(["inspect", str(out)]) == 2
    assert "original: expected the model" in capsys.readouterr().err


def test_a_folder_that_cannot_be_inspected_does_not_ask_for_its_original(model, text, tmp_path,
                                                                         capsys):
    config = QuantConfig("w4a8", weights="rtn", calibration_tokens=64, method="balanced")
    sq.quantize_folder(model, tmp_path / "out", config, text)
    assert main(["inspect", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "inspect the original with --method balanced" in said
    assert "original: expected" not in said


@pytest.mark.parametrize(("options", "message"), [
    (["--layer", "9"], "layer: expected 0 to 1, found 9"),
    (["--massive", "-3"], "massive: expected"),
    (["--csv", "no-such-folder/t.csv"], "no-such-folder/t.csv"),
    (["--picture", "p.bmpx"], "p.bmpx: expected a name that ends in one of"),
    (["--original", "."], "original: expected with a packed folder"),
])
def test_command_says_what_is_wrong(model, text, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", str(model), "--calibration", str(text), *options]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert message in error


def test_pictures_without_matplotlib_say_what_to_install(model, text, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["inspect", str(model), "--calibration", str(text), "--picture", "p.png"]) == 2
    assert "pip install 'singlequant[plots]'" in capsys.readouterr().err


def test_command_rejects_an_unknown_site(model, capsys):
    assert main(["inspect", str(model), "--site", "v"]) == 2
    assert "site: expected one of qkv, o, gate_up, down, found 'v'" in capsys.readouterr().err


# ---- the reference model ------------------------------------------------------------------------


@pytest.mark.slow
def test_singlequant_beats_hadamard_on_the_reference_model(reference_model):
    found = inspect_model(reference_model, ["hadamard", "singlequant"],
                          config=QuantConfig("w4a4", calibration_tokens=2048))
    figures = {name: np.mean([row.activation_error for row in
                              found.select(method=name, final=True)]) for name in found.methods}
    original = np.mean([row.activation_error for row in found.select(step=0, method="hadamard")])
    assert figures["singlequant"] < figures["hadamard"] < original
