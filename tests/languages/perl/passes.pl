use strict;
use warnings;
use List::Util qw(sum0);

chomp(my $name = <STDIN>);
print "Hello $name ", sum0(@ARGV), "\n";
