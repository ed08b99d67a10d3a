"""The house is small: lines of code, counted against the room that each part has."""

from processes import ROOT

METHOD = ("train.py", "data.py", "loss.py")  # what a reader with the paper reads end to end
ROOMS = {("train.py",): 500, METHOD: 1100}
ALL = 5900  # everything but tests, bench and examples


def lines(path):
    return len(path.read_text().splitlines())


def house():
    files = [*ROOT.glob("*.py"), *ROOT.glob("kernels/*"), *ROOT.glob("support/*")]
    return {str(path.relative_to(ROOT)): lines(path) for path in sorted(files) if path.is_file()}


def test_the_house_is_as_small_as_its_rooms_say():
    found = house()
    table = "".join(f"\n{count:6} {name}" for name, count in found.items())
    rooms = {names: sum(found[name] for name in names) for names in ROOMS}
    for names, most in ROOMS.items():
        assert rooms[names] <= most, f"{' + '.join(names)}: {rooms[names]} lines, of {most}{table}"
    assert sum(found.values()) <= ALL, f"all: {sum(found.values())} lines, of {ALL}{table}"
