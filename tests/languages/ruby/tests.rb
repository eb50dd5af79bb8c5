require 'minitest/autorun'

class SumTest < Minitest::Test
  def test_sum
    assert_equal FOUR, 2 + 2, 'not FOUR'
  end
end
