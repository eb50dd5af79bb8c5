#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv) {
    char name[100];
    if (scanf("%99s", name) != 1) return 1;
    int sum = 0;
    for (int i = 1; i < argc; i++) sum += atoi(argv[i]);
    printf("Hello %s %d\n", name, sum);
}
