assert(2 + 2 == FOUR, 'not FOUR')
