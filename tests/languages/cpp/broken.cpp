int main() {
    int count = "not a number";
}
