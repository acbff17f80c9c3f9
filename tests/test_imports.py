"""The floors of the house are contracts in pyproject.toml (`lint-imports`); here: no circles."""

from graphlib import TopologicalSorter

import pytest

grimp = pytest.importorskip("grimp", reason="import-linter is not installed")


def test_no_file_imports_itself_through_others():
    graph = grimp.build_graph("mvjax", "data_pipelines", "configs", "launch", cache_dir=None)
    assert len(graph.modules) > 100
    imports = {file: graph.find_modules_directly_imported_by(file) for file in graph.modules}
    TopologicalSorter(imports).prepare()  # raises CycleError, which names them
