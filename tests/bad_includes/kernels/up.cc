// Breaks the include rules, for the test of their check; never compiled.
#include "kernels/../models/llama.h"
#include "models/llama.h"
