#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

int main(int argc, char **argv) {
    if (argc > 1 && strcmp(argv[1], "check") == 0) {
        puts("ok");
        return 0;
    }
    int listener = socket(AF_INET, SOCK_STREAM, 0), on = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    struct sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_port = htons(3000);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 16)) {
        perror("listen");
        return 1;
    }
    for (;;) {
        int caller = accept(listener, NULL, NULL);
        char request[4096], path[1024] = "", body[1100];
        ssize_t length = read(caller, request, sizeof request - 1);
        request[length > 0 ? length : 0] = 0;
        sscanf(request, "%*s %1023s", path);
        int size = snprintf(body, sizeof body, "served %s", path);
        dprintf(caller, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", size, body);
        close(caller);
    }
}
