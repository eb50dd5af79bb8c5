class SumTest {
    public static void main(String[] args) {
        assert 2 + 2 == FOUR : "not FOUR";
    }
}
