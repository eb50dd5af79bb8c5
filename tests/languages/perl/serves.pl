use strict;
use warnings;
use IO::Socket::INET;

if (@ARGV && $ARGV[0] eq "check") {
    print "ok\n";
    exit;
}
my $server = IO::Socket::INET->new(LocalPort => 3000, Listen => 16, ReuseAddr => 1) or die "listen: $!";
while (my $caller = $server->accept) {
    my (undef, $path) = split / /, scalar <$caller>;
    while (my $line = <$caller>) { last if $line =~ /^\r?$/ }
    my $body = "served $path";
    my $length = length $body;
    print $caller "HTTP/1.1 200 OK\r\nContent-Length: $length\r\nConnection: close\r\n\r\n$body";
    close $caller;
}
