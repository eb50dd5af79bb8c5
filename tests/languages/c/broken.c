int main(void) {
    int count = not_a_number;
}
