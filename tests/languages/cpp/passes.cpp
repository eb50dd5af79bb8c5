#include <iostream>
#include <string>

int main(int argc, char **argv) {
    std::string name;
    std::cin >> name;
    int sum = 0;
    for (int i = 1; i < argc; i++) sum += std::stoi(argv[i]);
    std::cout << "Hello " << name << " " << sum << std::endl;
}
