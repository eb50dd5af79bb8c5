fn main() {
    let mut name = String::new();
    std::io::stdin().read_line(&mut name).unwrap();
    let sum: i64 = std::env::args()
        .skip(1)
        .map(|word| word.parse::<i64>().unwrap())
        .sum();
    println!("Hello {} {sum}", name.trim());
}
