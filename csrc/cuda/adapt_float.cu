// The kernels that adapt tasks, for tables of float32.
#include "adapt_launch.cuh"

namespace metarec_fast::cuda {

METAREC_ADAPT(float, float);

}  // namespace metarec_fast::cuda
