#include <iostream>

int main() {
    std::cerr << "about to fail" << std::endl;
    return 3;
}
