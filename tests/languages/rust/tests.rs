#[test]
fn sum() {
    assert_eq!(2 + 2, FOUR, "not FOUR");
}
