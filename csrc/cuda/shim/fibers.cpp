// Fibers for shim/device.h: a hand-written switch, since swapcontext enters the kernel every time.
#include <ctime>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "device.h"
#include "launch.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#ifdef SRN_TSAN  // this file itself is not instrumented
#include <sanitizer/tsan_interface.h>
#endif

namespace srn::cuda {
namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr double kPatience = 10;  // seconds of an OS thread, however busy the machine is

double processor_seconds() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
#ifdef SRN_TSAN
  void* tsan = nullptr;
#endif
};

#if defined(__x86_64__)
// Saves the callee-saved registers and the stack pointer, takes the other's.
asm(R"(
.text
.local srn_switch
.type srn_switch, @function
srn_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");
extern "C" void srn_switch(void** save, void* take);
#endif

// What orders the accesses of two fibers, for ThreadSanitizer.
void release(void* at) {
#ifdef SRN_TSAN
  __tsan_release(at);
#endif
  (void)at;
}
void acquire(void* at) {
#ifdef SRN_TSAN
  __tsan_acquire(at);
#endif
  (void)at;
}

void switch_to(Context& from, Context& to) {
#ifdef SRN_TSAN
  // Without the flag every switch would order what the fibers do, and hide missing barriers.
  __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__x86_64__)
  srn_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
}

std::atomic<bool> failed{false};
std::string failure;
std::atomic_flag failure_lock = ATOMIC_FLAG_INIT;

void record_failure(const std::string& what) {
  if (!failure_lock.test_and_set()) failure = what;
  failed = true;
}

struct Cta;
thread_local Cta* cta = nullptr;

struct Meeting {  // of the fibers at a barrier
  int arrived = 0;
  int64_t generation = 0;
  const char* file = nullptr;
  int line = 0;
};

struct Warp {
  Meeting meeting;
  double values[2][kWarp];
  double sum[2];
  float float_sum[2];
};

struct Copy {
  char* to;
  const char* from;
  int bytes;
};

struct Cta {
  int ctas;
  std::vector<char> memory;
  char* shared;
  std::vector<std::unique_ptr<char[]>> stacks;
  std::vector<Context> fibers{size_t(kThreads)};
  Context scheduler;
  std::vector<bool> done;
  int running = 0, alive = kThreads;
  Meeting all, consumers, groups[kWarps];
  Warp warps[kThreads / kWarp];
  std::map<void*, std::vector<Copy>> copies;
  std::function<void()> body;
  int spins = 0;
};

void give_way() {
  Cta& c = *cta;
  switch_to(c.fibers[c.running], c.scheduler);
}

void fiber_main() {
  acquire(cta);
  cta->body();
  release(cta);
  Cta& c = *cta;
  c.done[c.running] = true;
  --c.alive;
  for (;;) give_way();
}

void meet(Meeting& m, int threads, const char* file, int line) {
  if (m.arrived == 0) {
    m.file = file;
    m.line = line;
  } else if (m.line != line || std::strcmp(m.file, file) != 0) {
    fail(("threads wait at different barriers, lines " + std::to_string(m.line) + " and " +
          std::to_string(line))
             .c_str());
  }
  release(&m);
  const int64_t generation = m.generation;
  if (++m.arrived == threads) {
    m.arrived = 0;
    ++m.generation;
  } else {
    while (m.generation == generation) pause();
  }
  acquire(&m);
}

// All lanes give a value; returns the slot of this meeting.
int exchange(double x) {
  Warp& w = cta->warps[cta->running / kWarp];
  const int slot = int(w.meeting.generation & 1);
  w.values[slot][cta->running % kWarp] = x;
  if (w.meeting.arrived == kWarp - 1) {
    // The order of a butterfly of shuffles.
    double d[kWarp];
    float f[kWarp];
    for (int i = 0; i < kWarp; ++i) f[i] = float(d[i] = w.values[slot][i]);
    for (int m = kWarp / 2; m > 0; m /= 2)
      for (int i = 0; i < m; ++i) {
        d[i] += d[i + m];
        f[i] += f[i + m];
      }
    w.sum[slot] = d[0];
    w.float_sum[slot] = f[0];
  }
  meet(w.meeting, kWarp, "warp", 0);
  return slot;
}

void run_cta(int ctas, int shared_bytes, const std::function<void()>& body) {
  Cta c;
  c.ctas = ctas;
  c.memory.assign(shared_bytes + 128, char(0xff));  // NaN
  c.shared = reinterpret_cast<char*>(round_up(int64_t(c.memory.data()), 128));
  c.done.assign(kThreads, false);
  c.body = body;
  const double start = processor_seconds();
  cta = &c;
#ifdef SRN_TSAN
  c.scheduler.tsan = __tsan_get_current_fiber();
#endif
  for (int i = 0; i < kThreads; ++i) {
    c.stacks.push_back(std::make_unique<char[]>(kStackBytes));
    Context& f = c.fibers[i];
#ifdef SRN_TSAN
    f.tsan = __tsan_create_fiber(0);
#endif
    release(&c);
#if defined(__x86_64__)
    auto* top =
        reinterpret_cast<void**>(round_up(int64_t(c.stacks[i].get()), 16) + kStackBytes - 64);
    *--top = nullptr;  // where fiber_main would return to; keeps the stack aligned
    *--top = reinterpret_cast<void*>(&fiber_main);
    for (int k = 0; k < 6; ++k) *--top = nullptr;
    f.stack_pointer = top;
#else
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = c.stacks[i].get();
    f.context.uc_stack.ss_size = kStackBytes;
    makecontext(&f.context, fiber_main, 0);
#endif
  }
  // Now and then a warp, or all but one, falls behind: what is only true while they keep pace
  // fails.
  uint32_t random = uint32_t(uintptr_t(&c) >> 6) | 1;
  int behind = -1;
  bool alone = false;
  for (int64_t round = 0; c.alive > 0 && !failed; ++round) {
    if (round % 16 == 0) {
      random = random * 1664525 + 1013904223;
      behind = round % 32 ? -1 : int(random >> 16) % (kThreads / kWarp);
      alone = random >> 31;
    }
    for (int i = 0; i < kThreads && !failed; ++i) {
      if (c.done[i] || (behind >= 0 && (i / kWarp == behind) != alone)) continue;
      c.running = i;
      switch_to(c.scheduler, c.fibers[i]);
    }
    if (++c.spins % 64 == 0) {
      std::this_thread::yield();
      if (processor_seconds() - start > kPatience) record_failure("a wait without end");
    }
  }
  acquire(&c);
  for (auto& [barrier, copies] : c.copies)
    if (!copies.empty() && !failed) record_failure("a copy that nobody waited for");
#ifdef SRN_TSAN
  for (auto& f : c.fibers) __tsan_destroy_fiber(f.tsan);
#endif
  cta = nullptr;
}

}  // namespace

int thread_index() { return cta->running; }
int cta_count() { return cta->ctas; }
char* shared_memory() { return cta->shared; }

void sync_at(const char* file, int line, int threads) {
  if (cta->running >= threads) fail("a thread at a barrier that is not its own");
  meet(threads == kThreads ? cta->all : cta->consumers, threads, file, line);
}
void sync_group_at(int group, int threads, const char* file, int line) {
  if (cta->running / threads != group) fail("a thread at the barrier of another group");
  meet(cta->groups[group], threads, file, line);
}
void sync_warp() { exchange(0); }
double warp_sum_doubles(double x) {
  const int slot = exchange(x);
  return cta->warps[cta->running / kWarp].sum[slot];
}
float warp_sum_floats(float x) {
  const int slot = exchange(x);
  return cta->warps[cta->running / kWarp].float_sum[slot];
}
int from_leader(int x) {
  const int slot = exchange(x);
  return int(cta->warps[cta->running / kWarp].values[slot][0]);
}
void pause() { give_way(); }

void defer_copy(void* barrier, char* to, const char* from, int bytes) {
  const char* end = cta->shared + cta->memory.size() - 128;
  if (to < cta->shared || to + bytes > end) fail("a copy beyond shared memory");
  std::memset(to, 0xff, bytes);
  cta->copies[barrier].push_back({to, from, bytes});
}

void init(Barrier* b, int count) { *b = {int16_t(count), int16_t(count), 0}; }
void arrive(Barrier* b) {
  release(b);
  if (--b->pending < 0) fail("more arrivals than a barrier expects");
  if (b->pending == 0) {
    b->pending = b->count;
    ++b->phase;
  }
}
bool passed(Barrier* b, uint32_t parity) {
  if ((b->phase & 1) == parity) {
    pause();
    return false;
  }
  acquire(b);
  auto& copies = cta->copies[b];
  for (const Copy& c : copies) std::memcpy(c.to, c.from, c.bytes);
  if (!copies.empty()) release(b);  // the copies come before whoever passes next
  copies.clear();
  return true;
}
void fail(const char* what) {
  record_failure(what);
  for (;;) give_way();
}

void run_on_host(int ctas, int shared_bytes, const std::function<void()>& body) {
  failed = false;
  failure.clear();
  failure_lock.clear();
  std::vector<std::thread> threads;
  for (int i = 0; i < ctas; ++i) threads.emplace_back(run_cta, ctas, shared_bytes, body);
  for (auto& t : threads) t.join();
  if (failed) throw std::runtime_error("the CUDA shim: " + failure);
}

}  // namespace srn::cuda
