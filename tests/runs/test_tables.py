from runs import tables as table


def test_the_pages_hold_the_tables_of_the_measurements():
    for path, text in table.pages().items():
        assert path.read_text() == text, f"{path.name}: run `make tables`"
