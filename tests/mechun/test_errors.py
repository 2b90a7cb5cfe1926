from mechun.errors import DataError, MechunError, ModelError, RunError, UsageError, nearest


def test_each_kind_of_fault_leaves_with_its_own_code():
    codes = {kind: kind("x").exit_code for kind in (MechunError, UsageError, RunError, ModelError, DataError)}
    assert codes == {MechunError: 1, UsageError: 2, RunError: 2, ModelError: 3, DataError: 3}


def test_a_fault_reads_as_one_line_with_its_remedy():
    assert str(DataError("facts.jsonl is empty", "give it one object per line")) == (
        "facts.jsonl is empty (give it one object per line)"
    )
    assert str(DataError("facts.jsonl is empty")) == "facts.jsonl is empty"


def test_nearest_names_close_values_first_and_else_lists_some():
    assert nearest("forget1", ["forget01", "retain90"]) == "did you mean forget01?"
    assert nearest("zzz", [f"name{i}" for i in range(10)], "names").endswith("name7, ...")
    assert nearest("zzz", []) == ""
