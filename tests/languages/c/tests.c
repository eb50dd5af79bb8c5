#include <assert.h>

int main(void) {
    assert(2 + 2 == FOUR && "not FOUR");
    return 0;
}
