// The functions of the CUDA driver that the runtime calls, over the emulated device and the host's memory. Behind the kernels,
// whose entries FAKE_KERNELS lists as {"symbol", entry}.
#include <functional>
#include <map>
#include <string>
#include <vector>

typedef int CUresult;
typedef uint64_t CUdeviceptr;
struct fake_function { const char *name; void (*entry)(void **); std::vector<bool> pointers; unsigned shared; };
struct fake_launch { fake_function *function; emu_dim grid; unsigned threads; std::vector<uint64_t> values; };
struct fake_graph { std::vector<std::function<void()>> steps; };

static fake_function fake_functions[] = {FAKE_KERNELS};
static fake_graph *fake_recording;
static std::map<CUdeviceptr, size_t> fake_memory;
static size_t fake_total = 4ull << 30, fake_used;
static int fake_count = 1, fake_major = 9, fake_minor = 0, fake_fail;
static std::string fake_broken;
static long fake_launched, fake_graphs;
static double fake_clock;  // milliseconds, of which a block takes a thousandth

enum { INVALID_VALUE = 1, NO_MEMORY = 2, NO_DEVICE = 100, NOT_FOUND = 500, LAUNCH_FAILED = 719, CAPTURING = 900 };
#define API extern "C" __attribute__((visibility("default")))

// What tests ask and set.
API void fake_set(size_t total, int count, int major, int minor, const char *broken) {
  fake_total = total, fake_count = count, fake_major = major, fake_minor = minor, fake_broken = broken ? broken : "", fake_fail = 0;
}
// The same for processes that tests do not load the library into: FAKE_GPU="9.0 name of the function that is broken".
static int fake_environment() {
  const char *given = getenv("FAKE_GPU");
  char broken[256] = "";
  if (given) sscanf(given, "%d.%d %255s", &fake_major, &fake_minor, broken), fake_broken = broken;
  return 0;
}
static int fake_configured = fake_environment();
API long fake_asked(int what) { return what == 0 ? fake_launched : what == 1 ? fake_graphs : (long)fake_used; }


static bool fake_inside(CUdeviceptr p, size_t n) {
  auto it = fake_memory.upper_bound(p);
  if (it == fake_memory.begin()) return false;
  --it;
  return p + n <= it->first + it->second;
}
API CUresult cuInit(unsigned) { return fake_count ? 0 : NO_DEVICE; }
API CUresult cuDriverGetVersion(int *v) { *v = 12090; return 0; }
API CUresult cuDeviceGetCount(int *n) { *n = fake_count; return 0; }
API CUresult cuDeviceGet(int *d, int i) { *d = i; return 0; }
API CUresult cuDeviceGetName(char *name, int n, int) { strncpy(name, "emulated GPU", n); return 0; }
API CUresult cuDeviceGetAttribute(int *v, int what, int) {
  *v = what == 75 ? fake_major : what == 76 ? fake_minor : what == 97 ? 227 << 10 : what == 16 ? 4 : what == 38 ? 1 << 20 : 0;
  return 0;
}
API CUresult cuDevicePrimaryCtxRetain(void **c, int) { *c = (void *)1; return 0; }
API CUresult cuCtxSetCurrent(void *) { return 0; }
API CUresult cuMemGetInfo_v2(size_t *free, size_t *total) { *free = fake_total - fake_used, *total = fake_total; return 0; }
API CUresult cuMemAlloc_v2(CUdeviceptr *p, size_t n) {
  if (fake_recording) return CAPTURING;
  if (fake_used + n > fake_total) return NO_MEMORY;
  void *m = aligned_alloc(256, (n + 255) / 256 * 256);
  memset(m, 0xff, n);
  fake_used += n, fake_memory[*p = (CUdeviceptr)m] = n;
  return 0;
}
API CUresult cuMemFree_v2(CUdeviceptr p) {
  auto it = fake_memory.find(p);
  if (it == fake_memory.end()) return INVALID_VALUE;
  fake_used -= it->second, fake_memory.erase(it), free((void *)p);
  return 0;
}
API CUresult cuMemAllocHost_v2(void **p, size_t n) { *p = aligned_alloc(256, (n + 255) / 256 * 256); return 0; }
API CUresult cuMemFreeHost(void *p) { free(p); return 0; }
API CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, size_t n) {
  if (!fake_inside(to, n)) return INVALID_VALUE;
  memcpy((void *)to, from, n);
  return 0;
}
API CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t n, void *) { return cuMemcpyHtoD_v2(to, from, n); }
API CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t n, void *) {
  if (!fake_inside(from, n)) return INVALID_VALUE;
  memcpy(to, (void *)from, n);
  return 0;
}
static CUresult fake_do(std::function<void()> step) {
  if (fake_recording) fake_recording->steps.push_back(step);
  else step();
  return 0;
}
API CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t n, void *) {
  if (!fake_inside(to, n) || !fake_inside(from, n)) return INVALID_VALUE;
  return fake_do([=] { memcpy((void *)to, (void *)from, n); });
}
API CUresult cuMemsetD8_v2(CUdeviceptr p, unsigned char x, size_t n) { memset((void *)p, x, n); return 0; }
API CUresult cuMemsetD8Async(CUdeviceptr p, unsigned char x, size_t n, void *) {
  if (!fake_inside(p, n)) return INVALID_VALUE;
  return fake_do([=] { memset((void *)p, x, n); });
}
API CUresult cuModuleLoadData(void **m, const char *image) {
  if (memcmp(image, "\x7f" "ELF", 4)) return 200;
  *m = (void *)1;
  return 0;
}
API CUresult cuModuleGetFunction(void **f, void *, const char *name) {
  for (fake_function &k : fake_functions)
    if (!strcmp(k.name, name)) { *f = &k; return 0; }
  return NOT_FOUND;
}
API CUresult cuFuncSetAttribute(void *f, int what, int value) {
  if (what != 8 || value > 227 << 10) return INVALID_VALUE;
  ((fake_function *)f)->shared = (unsigned)value;
  return 0;
}
static void fake_execute(fake_launch &l) {
  void *params[256];
  for (size_t i = 0; i < l.values.size(); i++) params[i] = &l.values[i];
  emu_run(l.function->entry, l.grid, l.threads, params);
  fake_launched++, fake_clock += 1e-3 * (1 + l.grid.x * l.grid.y * l.grid.z);
}
API CUresult cuLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                            void *, void **params, void **) {
  fake_function *function = (fake_function *)f;
  unsigned allowed = function->shared > 48 << 10 ? function->shared : 48 << 10;
  if (!gx || !gy || !gz || gy > 65535 || gz > 65535 || by != 1 || bz != 1 || bx > 1024 || bx % 32 || shared > allowed) return INVALID_VALUE;
  if (fake_broken == function->name) { fake_fail = LAUNCH_FAILED; return 0; }
  fake_launch l{function, {gx, gy, gz}, bx, {}};
  for (size_t i = 0; i < function->pointers.size(); i++) {
    l.values.push_back(*(uint64_t *)params[i]);
    if (function->pointers[i] && !fake_inside(l.values[i], 1)) return INVALID_VALUE;
  }
  return fake_do([l]() mutable { fake_execute(l); });
}
API CUresult cuStreamCreate(void **s, unsigned) { *s = (void *)2; return 0; }
API CUresult cuStreamDestroy_v2(void *) { return 0; }
API CUresult cuStreamSynchronize(void *) { return fake_recording ? CAPTURING : fake_fail; }
API CUresult cuStreamBeginCapture_v2(void *, int) { fake_recording = new fake_graph; return 0; }
API CUresult cuStreamEndCapture(void *, void **g) { *g = fake_recording, fake_recording = nullptr; return 0; }
API CUresult cuGraphInstantiateWithFlags(void **e, void *g, unsigned long long) { *e = new fake_graph(*(fake_graph *)g); return 0; }
API CUresult cuGraphLaunch(void *e, void *) {
  fake_graphs++;
  for (auto &step : ((fake_graph *)e)->steps) step();
  return 0;
}
API CUresult cuGraphDestroy(void *g) { delete (fake_graph *)g; return 0; }
API CUresult cuGraphExecDestroy(void *e) { delete (fake_graph *)e; return 0; }
API CUresult cuEventCreate(void **e, unsigned) { *e = new double; return 0; }
API CUresult cuEventRecord(void *e, void *) { *(double *)e = fake_clock; return 0; }
API CUresult cuEventSynchronize(void *) { return fake_fail; }
API CUresult cuEventElapsedTime(float *ms, void *a, void *b) { *ms = (float)(*(double *)b - *(double *)a); return 0; }
API CUresult cuEventDestroy_v2(void *e) { delete (double *)e; return 0; }
API CUresult cuGetErrorName(int code, const char **s) {
  *s = code == NO_DEVICE ? "CUDA_ERROR_NO_DEVICE" : code == LAUNCH_FAILED ? "CUDA_ERROR_LAUNCH_FAILED" : "CUDA_ERROR";
  return 0;
}
API CUresult cuGetErrorString(int, const char **s) { *s = "as the test asked"; return 0; }
