"""docs/performance.md and the summary's table hold the figures of the kept results alone."""

import json

import pytest
from made_results import (
    ROOT,
    made_attention,
    made_end_to_end,
    made_ladder,
    made_peers,
    made_quantize,
    made_sharing,
    made_side_by_side,
    made_tasks,
    made_torch,
    made_transform,
    run,
)


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results" / "made-up"
    folder.mkdir(parents=True)
    old = made_peers()
    for row in old["rows"]:
        row["gops"] = 7777
    for name, value in (("2025-01-01-peers-avx2-1", old), ("2025-01-02-peers-avx2-1", made_peers()),
                        ("2025-01-02-ladder", made_ladder()),
                        ("2025-01-02-end-to-end", made_end_to_end()),
                        ("2025-01-02-quantize", made_quantize()),
                        ("2025-01-02-transform", made_transform()),
                        ("2025-01-02-attention", made_attention()),
                        ("2025-01-02-quantize-side-by-side", made_side_by_side()),
                        ("2025-01-02-sharing", made_sharing()),
                        ("2025-01-02-task-seconds", made_tasks()),
                        ("2025-01-02-torch-dynamic-passive", made_torch())):
        (folder / f"{name}.json").write_text(json.dumps(value))
    (folder / "notes.md").write_text("The profile says why.\n")
    summary = tmp_path / "summary.md"
    summary.write_text("before\n<!-- performance:begin -->\nold\n<!-- performance:end -->\nafter\n")
    return folder.parent


def generate(results, expect=0):
    base = results.parent
    done = run("performance", "--from", results, "--out", base / "page.md", "--summary",
               base / "summary.md", expect=expect)
    return done if expect else ((base / "page.md").read_text(), (base / "summary.md").read_text())


def test_page_holds_the_figures_of_the_newest_files(results):
    page, _ = generate(results)
    assert "7777" not in page
    assert "<!-- generated -->" not in page
    assert "| ours_w4a4 | ours | made | 141 | 250 |" in page  # sqrt(100 * 200), sqrt(240 * 260)
    assert "| ours_w4a4 | best int4 | 2.24x | 2.62x |" in page
    assert "Made Up 9000" in page
    assert "gone: it is not installed" in page
    assert "fma 256 111" in page
    assert "| avx2 | w4a4 | 512 | 271 | 283 | 74% | - |" in page
    assert "| our W4A4 | ours | decode | 64 | 46.0 | 45.0 - 47.0 | AVX2, FMA |" in page
    assert "| mse | 4.50 | 3.50 | 6.75 | 20.5 | 2.85 | 120 | 140 |" in page
    assert "| disk, cold file | 2.25 | GB/s |" in page
    assert "| calibration, 1024 tokens, per 10^9 weights: CPU | 22.5 | s |" in page
    assert "| mse | clip search | 1.12 |" in page
    assert "| 4096 | 64 x 64 | 1.50 | 12.2 | 20.5 | 333 | 97.0 | 14% |" in page
    assert "| LLaMA-3-8B | 16 | 2048 | 8 | 250 | 12.5 | 14.5 | 2.75x |" in page
    assert "| ours | 20.5 | 10.5 - 30.5 |" in page
    assert "| llm-compressor | 87.1 | 81.5 - 95.5 |" in page
    assert "| 125 | 118 | 0.94x | 1.06x |" in page
    assert "| choose | singlequant w4a8 | 50 | 2.00 | 1.50 - 2.50 | 4.00x |" in page
    assert "through lm_eval 0.4.13. The first row of a task is transformers 5.0 with" in page
    assert "| bert | w4a8 | 12.5 | 11.5 - 13.5 | 1.25x | 2.50x | 0.062 | 4.50 |" in page
    assert "OMP_WAIT_POLICY passive." in page
    assert "The profile says why." in page


def test_page_says_which_aims_are_met(results):
    page, _ = generate(results)
    for line in (
        "ours_w4a4, m = 512, over ggml_q4_0 | >= 2.50x | 2.76x | met |",
        "ours_w4a4, m = 512, over the fastest int4 | >= 1.40x | 2.62x | met |",
        "ours_w4a8, m = 512, over ours_w4a4 | >= 0.85x | 0.78x | not met |",
        "ours_w4a4, m = 16, over the fastest int4 | >= 1.30x | - | no figure |",
        "ours_w4a4, m = 1, of the read loop | >= 85% | 88% | met |",
        "bare_w4a4, m = 512, of the peak | >= 75% | 62% | not met |",
        "transform of w4a4 on avx2, m = 512 | <= 15% | 14% | met |",
        "two threads on avx2, w4a8 | >= 1.80x | 1.74x | not met |",
        "our W4A4, decode, batch 64, over the fastest 16-bit | >= 2.30x | 2.30x | met |",
        "our W4A4, decode, batch 64, over the fastest int4 | >= 1.00x | 0.92x | not met |",
        "our W4A8, decode, batch 64, over the fastest int4 | >= 1.00x | 1.20x | met |",
        "the whole of GPTQ over llm-compressor's | >= 5.00x | 4.25x | not met |",
    ):
        assert line in page, line
    assert "our W4A16, decode" not in page


def test_each_section_names_its_command_commit_and_load(results):
    page, _ = generate(results)
    assert ("`python -m benchmarks.end_to_end --layers 3`, 2025-01-02, commit abc, load 1.5 before"
            in page)
    assert "`python -m benchmarks.kernel_ladder --seconds 7`, 2025-01-02, commit abc, load" in page
    assert "/here" not in page


def test_summary_gets_the_table_between_its_marks(results):
    _, summary = generate(results)
    assert summary.startswith("before\n<!-- performance:begin -->\n")
    assert summary.endswith("<!-- performance:end -->\nafter\n")
    assert "old" not in summary
    assert "| W4A4 | best int4 | 2.24x | 2.62x |" in summary
    assert ("CPU seconds: 22.5 for calibration, 1024 tokens and 6.25 for solving rotations "
            "(balanced). To quantize and write them takes 6.75 CPU seconds and 120 MB with "
            "`--weights mse`." in summary)


def test_summary_is_left_as_it_is_without_peers(results):
    for path in (results / "made-up").glob("*peers*"):
        path.unlink()
    before = (results.parent / "summary.md").read_text()
    assert "expected a file of peers" in generate(results, expect=1).stderr
    assert (results.parent / "summary.md").read_text() == before
    assert "### Kernel ladder" in (results.parent / "page.md").read_text()


def test_generator_names_a_folder_that_is_not_there(tmp_path):
    done = run("performance", "--from", tmp_path / "none", "--out", tmp_path / "page.md",
               expect=1)
    assert "--from: expected a folder" in done.stderr
    assert not (tmp_path / "page.md").exists()


def test_generator_refuses_strange_files_and_keeps_the_page(results):
    (results.parent / "page.md").write_text("as it was")
    quick = json.dumps({**made_ladder(), "quick": True})
    old_quick = json.dumps({**made_end_to_end(), "settings": {"quick": True}})
    for name, text, part in (("notes.json", "{}", "expected a name like"),
                             ("2025-01-02-ladder.json", '{"rows": []}', "environment and rows"),
                             ("2025-01-02-ladder.json", quick, "a quick run"),
                             ("2025-01-02-end-to-end.json", old_quick, "a quick run")):
        path = results / "made-up" / name
        before = path.read_text() if path.exists() else None
        path.write_text(text)
        assert part in generate(results, expect=1).stderr
        if before is None:
            path.unlink()
        else:
            path.write_text(before)
    (results.parent / "summary.md").write_text("no marks")
    assert "performance:begin" in generate(results, expect=1).stderr
    assert (results.parent / "page.md").read_text() == "as it was"


def test_the_repositorys_summary_has_the_marks():
    text = (ROOT / "docs" / "summary.md").read_text()
    assert text.index("<!-- performance:begin -->") < text.index("<!-- performance:end -->")
