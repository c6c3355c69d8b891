// The kernels that adapt tasks, for tables of float64.
#include "adapt_launch.cuh"

namespace metarec_fast::cuda {

METAREC_ADAPT(double, double);

}  // namespace metarec_fast::cuda
