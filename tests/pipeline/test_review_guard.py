"""Who is let in: one browser per link, for as long as it is used."""

from pipeline.review_guard import Door


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_link_lets_in_once() -> None:
    links: list[str] = []
    door = Door(links.append, 60)
    assert len(links) == 1 and len(links[0]) >= 22  # 128 bits
    assert door.enter("") is None and door.enter("é\ud800") is None and door.enter(links[0][:-1]) is None
    visit = door.enter(links[0])
    assert visit is not None and door.enter(links[0]) is None and len(links) == 1
    assert door.visit(visit.cookie) is visit
    assert door.visit(None) is None and door.visit(visit.csrf) is None and door.visit("é") is None
    assert len({links[0], visit.cookie, visit.csrf}) == 3


def test_the_door_locks_without_use_and_shows_a_new_link() -> None:
    links: list[str] = []
    clock = Clock()
    door = Door(links.append, 60, clock)
    visit = door.enter(links[0])
    assert visit is not None
    for _ in range(3):
        clock.now += 59
        assert door.visit(visit.cookie) is visit
    clock.now += 61
    assert door.visit(visit.cookie) is None and door.visit(visit.cookie) is None
    assert len(links) == 2 and links[0] != links[1]
    again = door.enter(links[1])
    assert again is not None and again.cookie != visit.cookie and door.visit(visit.cookie) is None
