#include "evaluator_includes.h"

#define PSFAST_NAMESPACE portable
#define PSFAST_BYTES 16
#define PSFAST_VECTORS 2
#define PSFAST_OUTPUTS 4
#include "evaluator_body.h"
