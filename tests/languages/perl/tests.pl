use strict;
use warnings;
use Test::More tests => 1;

is(2 + 2, FOUR, 'not FOUR');
