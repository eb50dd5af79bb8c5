def test_sum():
    assert 2 + 2 == FOUR, 'not FOUR'
