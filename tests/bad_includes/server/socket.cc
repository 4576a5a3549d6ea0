// Breaks the include rules, for the test of their check; never compiled.
#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>
