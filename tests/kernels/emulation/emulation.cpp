// emulation.cpp - fibers, the scheduler, and the exact meaning of each warp instruction. See emulation.h for what is not modelled.
#include "emulation.h"

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define EMULATION_ASAN 1
#else
#define EMULATION_ASAN 0
#endif

namespace emulation {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kMaxStaticShared = 48 * 1024;
constexpr unsigned kMaxThreads = 1024;

[[noreturn]] void fail(const char* message) {
  std::fprintf(stderr, "emulation: %s\n", message);
  std::fflush(stderr);
  std::abort();
}

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool valid;
};

enum class State { kReady, kAtBarrier, kAtMeeting, kDone };

#if defined(__x86_64__)
// Saves the callee-saved registers on the current stack, stores its pointer, and continues on another stack.
extern "C" void emulation_switch(void** save, void* load);
asm(R"(
.text
.globl emulation_switch
.type emulation_switch,@function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch,.-emulation_switch
)");
struct Context {
  void* stack_pointer = nullptr;
};
void switch_context(Context& save, Context& load) { emulation_switch(&save.stack_pointer, load.stack_pointer); }
void start_context(Context& c, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStackBytes);
  top[-1] = nullptr;                              // a return address for entry, never used; it also aligns the stack
  top[-2] = reinterpret_cast<void*>(entry);       // where the first switch returns to
  for (int i = 3; i <= 8; ++i) top[-i] = nullptr;  // six registers
  c.stack_pointer = top - 8;
}
#else
struct Context {
  ucontext_t u;
};
void switch_context(Context& save, Context& load) { swapcontext(&save.u, &load.u); }
void start_context(Context& c, char* stack, void (*entry)()) {
  getcontext(&c.u);
  c.u.uc_stack.ss_sp = stack;
  c.u.uc_stack.ss_size = kStackBytes;
  c.u.uc_link = nullptr;
  makecontext(&c.u, entry, 0);
}
#endif

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  Context context;
  void* fake_stack = nullptr;
  State state = State::kDone;
  dim3 thread;
  std::vector<std::vector<Copy>> groups;  // committed cp.async groups, oldest first
  std::vector<Copy> open;
};

struct Warp {
  Exchange exchange;
  int arrived = 0;
  Combine combine = nullptr;
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<int> order;
  Context scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  int current = 0;
  int threads = 0;
  int at_barrier = 0;
  dim3 block_index, block_size, grid_size;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  const std::function<void()>* body = nullptr;
  uint64_t random = 1;

  uint64_t next_random() {
    random = random * 6364136223846793005ull + 1442695040888963407ull;
    return random >> 33;
  }
};
Machine machine;

Fiber& self() { return machine.fibers[static_cast<size_t>(machine.current)]; }
Warp& own_warp() { return machine.warps[static_cast<size_t>(machine.current / kWarp)]; }

void leave(bool finished) {
  Fiber& f = self();
#if EMULATION_ASAN
  __sanitizer_start_switch_fiber(finished ? nullptr : &f.fake_stack, machine.scheduler_stack, machine.scheduler_stack_bytes);
#else
  (void)finished;
#endif
  switch_context(f.context, machine.scheduler);
#if EMULATION_ASAN
  __sanitizer_finish_switch_fiber(f.fake_stack, nullptr, nullptr);
#endif
}

void fiber_main() {
#if EMULATION_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_stack_bytes);
#endif
  (*machine.body)();
  Fiber& f = self();
  for (const auto& group : f.groups)
    for (const Copy& c : group)
      if (c.bytes > 0) fail("a thread ended with cp.async copies that nobody waited for");
  f.state = State::kDone;
  leave(true);
  fail("a finished fiber was resumed");
}

void resume(int index) {
  machine.current = index;
  Fiber& f = machine.fibers[static_cast<size_t>(index)];
#if EMULATION_ASAN
  __sanitizer_start_switch_fiber(&machine.scheduler_fake_stack, f.stack.get(), kStackBytes);
#endif
  switch_context(machine.scheduler, f.context);
#if EMULATION_ASAN
  __sanitizer_finish_switch_fiber(machine.scheduler_fake_stack, nullptr, nullptr);
#endif
}

void run_block() {
  const unsigned width = machine.block_size.x;
  for (int i = 0; i < machine.threads; ++i) {
    Fiber& f = machine.fibers[static_cast<size_t>(i)];
    f.thread = dim3(static_cast<unsigned>(i) % width, static_cast<unsigned>(i) / width, 0);
    f.state = State::kReady;
    f.groups.clear();
    f.open.clear();
    f.fake_stack = nullptr;
    start_context(f.context, f.stack.get(), &fiber_main);
  }
  for (Warp& w : machine.warps) w.arrived = 0;
  machine.at_barrier = 0;
  for (size_t i = machine.order.size(); i > 1; --i) std::swap(machine.order[i - 1], machine.order[machine.next_random() % i]);
  for (size_t i = 0; i < machine.shared_bytes; ++i) machine.shared[i] = static_cast<unsigned char>(0xa5 + 31 * i);

  int done = 0;
  while (done < machine.threads) {
    bool progress = false;
    for (const int index : machine.order) {
      Fiber& f = machine.fibers[static_cast<size_t>(index)];
      if (f.state != State::kReady) continue;
      resume(index);
      progress = true;
      if (f.state == State::kDone) ++done;
    }
    if (!progress) fail("deadlock: some threads of a block wait at a barrier or a warp instruction that others never reach");
  }
}

}  // namespace

dim3 thread_index() { return self().thread; }
dim3 block_index() { return machine.block_index; }
dim3 block_size() { return machine.block_size; }
dim3 grid_size() { return machine.grid_size; }
unsigned char* shared() { return machine.shared; }
Exchange& exchange() { return own_warp().exchange; }
void set_seed(uint64_t seed) { machine.random = seed * 2 + 1; }
int64_t streamed_bytes(int64_t add, bool reset) {
  static int64_t total = 0;
  const int64_t before = total;
  total = reset ? 0 : total + add;
  return before;
}

void barrier() {
  self().state = State::kAtBarrier;
  if (++machine.at_barrier == machine.threads) {
    machine.at_barrier = 0;
    for (int i = 0; i < machine.threads; ++i) machine.fibers[static_cast<size_t>(i)].state = State::kReady;
    return;
  }
  leave(false);
}

void meet(Combine combine) {
  Warp& w = own_warp();
  if (w.arrived == 0) w.combine = combine;
  if (w.combine != combine) fail("lanes of one warp are at different warp instructions");
  self().state = State::kAtMeeting;
  if (++w.arrived == kWarp) {
    combine(w.exchange);
    w.arrived = 0;
    const int first = machine.current / kWarp * kWarp;
    for (int i = first; i < first + kWarp; ++i) machine.fibers[static_cast<size_t>(i)].state = State::kReady;
    return;
  }
  leave(false);
}

void copy_later(void* to, const void* from, int bytes, bool valid) {
  if (reinterpret_cast<uintptr_t>(to) % static_cast<unsigned>(bytes) != 0) fail("cp.async: misaligned shared address");
  if (reinterpret_cast<uintptr_t>(from) % static_cast<unsigned>(bytes) != 0) fail("cp.async: misaligned global address");
  const unsigned char* place = static_cast<unsigned char*>(to);
  if (place < machine.shared || place + bytes > machine.shared + machine.shared_bytes) fail("cp.async: outside shared memory");
  self().open.push_back(Copy{to, from, bytes, valid});
}

void copy_commit() {
  Fiber& f = self();
  f.groups.push_back(std::move(f.open));
  f.open.clear();
}

void copy_wait(int pending) {
  Fiber& f = self();
  while (f.groups.size() > static_cast<size_t>(pending)) {
    for (const Copy& c : f.groups.front()) {
      if (c.valid) {
        std::memcpy(c.to, c.from, static_cast<size_t>(c.bytes));
      } else {
        std::memset(c.to, 0, static_cast<size_t>(c.bytes));
      }
    }
    f.groups.erase(f.groups.begin());
  }
}

bool run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body) {
  const unsigned threads = block.x * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) return false;
  if (threads == 0 || threads > kMaxThreads || shared_bytes > kMaxStaticShared) return false;
  if (threads % kWarp != 0) fail("a block that is not a multiple of 32 threads");
  machine.threads = static_cast<int>(threads);
  if (machine.fibers.size() < threads) machine.fibers.resize(threads);
  machine.warps.resize(threads / kWarp);
  machine.order.resize(threads);
  for (unsigned i = 0; i < threads; ++i) machine.order[i] = static_cast<int>(i);
  machine.block_size = block;
  machine.grid_size = grid;
  machine.body = &body;
  machine.shared_bytes = shared_bytes;
  machine.shared = static_cast<unsigned char*>(std::malloc(shared_bytes > 0 ? shared_bytes : 1));  // exact, for AddressSanitizer
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      machine.block_index = dim3(x, y, 0);
      run_block();
    }
  }
  std::free(machine.shared);
  machine.shared = nullptr;
  return true;
}

}  // namespace emulation

namespace ecmfq {

// Not sanitized: it is the emulator's inner loop, and it looks for overflow itself.
__attribute__((no_sanitize("address", "undefined"))) void emulate_mma(emulation::Exchange& e) {
  int16_t a[16][32], b[8][32];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane >> 2, quad = lane & 3;
    const uint32_t* in = e.in[lane];
    for (int reg = 0; reg < 4; ++reg)
      for (int byte = 0; byte < 4; ++byte)
        a[group + 8 * (reg & 1)][4 * quad + byte + 16 * (reg >> 1)] = static_cast<int8_t>(in[reg] >> (8 * byte));
    for (int reg = 0; reg < 2; ++reg)
      for (int byte = 0; byte < 4; ++byte) b[group][4 * quad + byte + 16 * reg] = static_cast<int8_t>(in[4 + reg] >> (8 * byte));
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane >> 2, quad = lane & 3;
    for (int q = 0; q < 4; ++q) {
      const int16_t* row = a[group + 8 * (q >> 1)];
      const int16_t* col = b[2 * quad + (q & 1)];
      int32_t dot = 0;
      for (int k = 0; k < 32; ++k) dot += static_cast<int32_t>(row[k]) * col[k];
      const int64_t sum = int64_t{static_cast<int32_t>(e.in[lane][6 + q])} + dot;
      if (sum > INT32_MAX || sum < INT32_MIN) emulation::fail("mma: an int32 accumulator overflowed");
      e.out[lane][q] = static_cast<uint32_t>(sum);
    }
  }
}

void emulate_ballot(emulation::Exchange& e) {
  uint32_t votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= (e.in[lane][0] & 1u) << lane;
  for (int lane = 0; lane < 32; ++lane) e.out[lane][0] = votes;
}

void emulate_shuffle_xor(emulation::Exchange& e) {
  for (uint32_t lane = 0; lane < 32; ++lane) e.out[lane][0] = e.in[(lane ^ e.in[lane][1]) & 31u][0];
}

float half_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const int exponent = (bits >> 10) & 31;
  const uint32_t fraction = bits & 0x3ffu;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | (fraction << 13));
  if (exponent == 0) {
    const float magnitude = std::ldexp(static_cast<float>(fraction), -24);
    return sign ? -magnitude : magnitude;
  }
  return bits_to_float(sign | static_cast<uint32_t>(exponent + 112) << 23 | fraction << 13);
}

uint16_t float_to_half(float v) {
  const uint32_t bits = float_bits(v);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and more round to infinity
  if (magnitude < 0x38800000u) {                        // below 2^-14: subnormal; the scaling is exact, the rounding half to even
    const float scaled = std::ldexp(bits_to_float(magnitude), 24);
    return static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyintf(scaled)));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

}  // namespace ecmfq
