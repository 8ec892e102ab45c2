from eval import table


def test_the_readme_holds_the_tables_of_the_measurements():
    text = table.README.read_text()
    assert table.with_tables(text) == text, "run `make tables`"
