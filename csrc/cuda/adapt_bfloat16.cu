// The kernels that adapt tasks, for tables of bfloat16.
#include "adapt_launch.cuh"

namespace metarec_fast::cuda {

METAREC_ADAPT(float, BFloat16);

}  // namespace metarec_fast::cuda
