// Breaks the include rules, for the test of their check; never compiled.
#include <netdb.h>
