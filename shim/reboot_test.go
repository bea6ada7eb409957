package shim

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	taskAPI "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/control"
	"github.com/stasis-containers/stasis/pkg/checkpoint/fsys"
	"github.com/stasis-containers/stasis/pkg/checkpoint/store"
)

// machine is a container's processes and cgroup, and the inner service over
// them, as far as these tests need them.
type machine struct {
	taskAPI.TTRPCTaskService

	mu     sync.Mutex
	frozen bool
	// ran is how often the processes could run after the last dump.
	ran     int
	dead    bool
	signals []uint32
	exited  chan struct{}
	// dump is called by each dump; its error is the dump's.
	dump func(ctx context.Context) error
}

func (m *machine) freeze(ctx context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.frozen = true
	return ctx.Err()
}

func (m *machine) thaw() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.frozen && !m.dead {
		m.ran++
	}
	m.frozen = false
	return nil
}

func (m *machine) killAll() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.dead {
		m.dead = true
		close(m.exited)
	}
	return nil
}

func (m *machine) pids() ([]uint32, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.dead {
		return nil, os.ErrNotExist
	}
	return []uint32{7}, nil
}

func (m *machine) leaveVfork(context.Context) error { return nil }
func (m *machine) stat() (any, error)               { return nil, errors.New("no figures") }
func (m *machine) memoryBytes() (int64, error)      { return 4096, nil }

func (m *machine) State(context.Context, *taskAPI.StateRequest) (*taskAPI.StateResponse, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.dead {
		return &taskAPI.StateResponse{Pid: 7, Status: task.Status_STOPPED}, nil
	}
	return &taskAPI.StateResponse{Pid: 7, Status: task.Status_RUNNING}, nil
}

func (m *machine) Pids(context.Context, *taskAPI.PidsRequest) (*taskAPI.PidsResponse, error) {
	return &taskAPI.PidsResponse{}, nil
}

func (m *machine) Checkpoint(ctx context.Context, r *taskAPI.CheckpointTaskRequest) (*emptypb.Empty, error) {
	if err := m.dump(ctx); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(r.Path, "pages-1.img"), []byte("memory"), 0o600); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.frozen || m.dead {
		return nil, errors.New("the container is not frozen, or dead")
	}
	m.ran = 0
	return empty, nil
}

func (m *machine) Kill(_ context.Context, r *taskAPI.KillRequest) (*emptypb.Empty, error) {
	m.mu.Lock()
	m.signals = append(m.signals, r.Signal)
	m.mu.Unlock()
	m.mu.Lock()
	dead := m.dead
	m.mu.Unlock()
	if r.Signal == 9 && !dead { // runc thaws only what it kills
		return empty, errors.Join(m.killAll(), m.thaw())
	}
	return empty, nil
}

func (m *machine) Exec(context.Context, *taskAPI.ExecProcessRequest) (*emptypb.Empty, error) {
	return empty, nil
}

func (m *machine) Delete(context.Context, *taskAPI.DeleteRequest) (*taskAPI.DeleteResponse, error) {
	return &taskAPI.DeleteResponse{}, nil
}

func (m *machine) Wait(ctx context.Context, _ *taskAPI.WaitRequest) (*taskAPI.WaitResponse, error) {
	select {
	case <-m.exited:
		return &taskAPI.WaitResponse{ExitStatus: 137}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// rebootable makes a running container of the policy.
func rebootable(t *testing.T, policy checkpoint.Policy) (*service, *machine, *store.Store) {
	t.Helper()
	s, _ := testService(t)
	m := &machine{exited: make(chan struct{}), dump: func(context.Context) error { return nil }}
	s.TTRPCTaskService = m
	s.findGroup = func(int, string) (group, error) { return m, nil }
	s.config.Root = filepath.Join(t.TempDir(), "store")
	s.config.MinFreeBytes = 0
	s.config.CallerMargin = 0
	st, err := store.Open(fsys.OS{}, s.config.Root)
	if err != nil {
		t.Fatal(err)
	}
	s.openStore = func() (*store.Store, error) { return st, nil }
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		t.Fatal(err)
	}
	facts := fmt.Sprintf(`{"bootID": %q}`, strings.TrimSpace(string(boot)))
	if err := os.WriteFile(filepath.Join(s.config.RuntimeDir, hostFactsFile), []byte(facts), 0o600); err != nil {
		t.Fatal(err)
	}
	c := newContainer("c")
	c.bundle, c.upper, c.work = t.TempDir(), t.TempDir(), t.TempDir()
	c.optedIn, c.spec = true, &specs.Spec{}
	c.settings.Policy = policy
	c.identity = checkpoint.Identity{Namespace: "ns", Key: "key", Container: "app"}
	c.request = &taskAPI.CreateTaskRequest{ID: "c", Bundle: c.bundle}
	c.startedAt, c.pid, c.cgroup = time.Now(), 7, m
	s.containers["c"] = c
	t.Cleanup(func() { m.killAll() })
	return s, m, st
}

// machineState returns what the processes and the record are like.
func machineState(t *testing.T, m *machine, st *store.Store) string {
	t.Helper()
	m.mu.Lock()
	defer m.mu.Unlock()
	state := "running"
	if m.frozen {
		state = "frozen"
	}
	if m.dead {
		state = "dead"
	}
	return strings.TrimSpace(fmt.Sprintf("%s %s", state, stateOf(t, st)))
}

func wantMachine(t *testing.T, m *machine, st *store.Store, want string) {
	t.Helper()
	if got := machineState(t, m, st); got != want {
		t.Errorf("the container is %q, want %q", got, want)
	}
}

func wantFrozen(t *testing.T, m *machine) {
	t.Helper()
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.frozen {
		t.Error("the container is not frozen")
	}
}

func wantStatus(t *testing.T, s *service, want control.State) control.Status {
	t.Helper()
	got, err := s.Status(t.Context(), "c")
	if err != nil || got.State != want {
		t.Errorf("status %+v, %v, want %s", got, err, want)
	}
	return got
}

func stop(t *testing.T, s *service, signal uint32) {
	t.Helper()
	if _, err := s.Kill(t.Context(), &taskAPI.KillRequest{ID: "c", Signal: signal}); err != nil {
		t.Fatalf("signal %d: %v", signal, err)
	}
}

func mustPrepare(t *testing.T, s *service) control.Result {
	t.Helper()
	r, err := s.Prepare(t.Context(), "c")
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestPrepare: the container is frozen with a record, answers, refuses what
// would need it to run, and another Prepare finds it done.
func TestPrepare(t *testing.T) {
	s, m, st := rebootable(t, checkpoint.PolicyReboot)
	wantStatus(t, s, control.Running)
	r := mustPrepare(t, s)
	if r.Already || r.SizeBytes == 0 || r.CheckpointID == "" {
		t.Errorf("result %+v", r)
	}
	wantMachine(t, m, st, "frozen committed")
	if got := wantStatus(t, s, control.Prepared); got.CheckpointID != r.CheckpointID || got.PID != 7 || got.Identity.Key != "key" {
		t.Errorf("status %+v", got)
	}
	if state, err := s.State(t.Context(), &taskAPI.StateRequest{ID: "c"}); err != nil || state.Status != task.Status_RUNNING {
		t.Errorf("state %v, %v", state, err)
	}
	for name, call := range map[string]func() error{
		"exec": func() error {
			_, err := s.Exec(t.Context(), &taskAPI.ExecProcessRequest{ID: "c", ExecID: "e"})
			return err
		},
		"checkpoint": func() error {
			_, err := s.Checkpoint(t.Context(), &taskAPI.CheckpointTaskRequest{ID: "c"})
			return err
		},
		"pause":  func() error { _, err := s.Pause(t.Context(), &taskAPI.PauseRequest{ID: "c"}); return err },
		"resume": func() error { _, err := s.Resume(t.Context(), &taskAPI.ResumeRequest{ID: "c"}); return err },
		"update": func() error { _, err := s.Update(t.Context(), &taskAPI.UpdateTaskRequest{ID: "c"}); return err },
		"delete": func() error { _, err := s.Delete(t.Context(), &taskAPI.DeleteRequest{ID: "c"}); return err },
	} {
		if err := errgrpc.ToNative(call()); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "prepare-reboot --abort") {
			t.Errorf("%s: %v, want unavailable and the way out", name, err)
		}
	}
	if again := mustPrepare(t, s); !again.Already || again.CheckpointID != r.CheckpointID {
		t.Errorf("again: %+v", again)
	}
	for _, id := range []string{"unknown", "plain"} {
		s.containers["plain"] = newContainer("plain")
		_, err := s.Prepare(t.Context(), id)
		if !errdefs.IsNotFound(err) || !errdefs.IsNotFound(s.Abort(t.Context(), id)) {
			t.Errorf("%s: %v, want not found", id, err)
		}
	}
}

// TestKillPrepared: every signal, and the end of the shim, kills the container
// while it is frozen; the record stays, and the container can be deleted.
func TestKillPrepared(t *testing.T) {
	for name, kill := range map[string]func(*service, *machine){
		"SIGTERM":        func(s *service, _ *machine) { stop(t, s, 15) },
		"SIGKILL":        func(s *service, _ *machine) { stop(t, s, 9) },
		"by others":      func(_ *service, m *machine) { m.killAll() },
		"end of a shim":  func(s *service, _ *machine) { s.killPrepared(t.Context()) },
		"both at a time": func(s *service, _ *machine) { killTwice(t, s) },
	} {
		for _, policy := range []checkpoint.Policy{checkpoint.PolicyReboot, checkpoint.PolicyResume} {
			t.Run(name+", "+string(policy), func(t *testing.T) {
				s, m, st := rebootable(t, policy)
				mustPrepare(t, s)
				kill(s, m)
				wantMachine(t, m, st, "dead committed")
				// Of two signals at a time both may reach what is dying.
				if m.ran != 0 || name != "both at a time" && slices.Contains(m.signals, 15) {
					t.Errorf("it ran %d times after the dump, signals %v", m.ran, m.signals)
				}
				wantStatus(t, s, control.Stopped)
				if err := s.Abort(t.Context(), "c"); err != nil {
					t.Errorf("abort: %v", err)
				}
				wantMachine(t, m, st, "dead committed")
				if name == "end of a shim" {
					return // it answers no more
				}
				if err := s.lookup("c").waitWhile(t.Context(), opPrepared, opDump); err != nil {
					t.Fatal(err)
				}
				if _, err := s.Prepare(t.Context(), "c"); !errdefs.IsFailedPrecondition(err) && !errdefs.IsUnavailable(err) {
					t.Errorf("prepare of a dead container: %v", err)
				}
				if m.frozen {
					t.Error("runc would find it paused")
				}
				if _, err := s.Delete(t.Context(), &taskAPI.DeleteRequest{ID: "c"}); err != nil {
					t.Errorf("delete: %v", err)
				}
			})
		}
	}
}

func killTwice(t *testing.T, s *service) {
	var wg sync.WaitGroup
	for _, signal := range []uint32{15, 9} {
		wg.Go(func() {
			if _, err := s.Kill(t.Context(), &taskAPI.KillRequest{ID: "c", Signal: signal}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

// TestAbortPrepared: the record goes before the container goes on, and what
// follows is as if nothing had been.
func TestAbortPrepared(t *testing.T) {
	s, m, st := rebootable(t, checkpoint.PolicyResume)
	if err := s.Abort(t.Context(), "c"); err != nil {
		t.Errorf("with nothing to do: %v", err)
	}
	first := mustPrepare(t, s)
	if err := s.Abort(t.Context(), "c"); err != nil {
		t.Fatal(err)
	}
	wantMachine(t, m, st, "running")
	wantStatus(t, s, control.Running)
	if _, err := s.Exec(t.Context(), &taskAPI.ExecProcessRequest{ID: "c", ExecID: "e"}); err != nil {
		t.Errorf("exec: %v", err)
	}
	if again := mustPrepare(t, s); again.Already || again.CheckpointID == first.CheckpointID {
		t.Errorf("prepared again: %+v", again)
	}
	if err := s.Abort(t.Context(), "c"); err != nil {
		t.Fatal(err)
	}
	stop(t, s, 15)
	wantMachine(t, m, st, "dead committed")
}

// TestAbortRecordGone: a record that somebody removed does not hold the container.
func TestAbortRecordGone(t *testing.T) {
	s, m, st := rebootable(t, checkpoint.PolicyReboot)
	if err := st.Remove(t.Context(), mustPrepare(t, s).CheckpointID); err != nil {
		t.Fatal(err)
	}
	if err := s.Abort(t.Context(), "c"); err != nil {
		t.Fatal(err)
	}
	wantMachine(t, m, st, "running")
}

// TestAbortFails: while the record is there or may come back the container
// stays frozen; a later Abort works.
func TestAbortFails(t *testing.T) {
	s, m, st := rebootable(t, checkpoint.PolicyReboot)
	claim, err := st.Claim(t.Context(), mustPrepare(t, s).CheckpointID, "other")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Abort(t.Context(), "c"); !errdefs.IsUnavailable(err) {
		t.Errorf("abort of what is claimed: %v", err)
	}
	wantMachine(t, m, st, "frozen claimed")
	wantStatus(t, s, control.Prepared)
	if err := claim.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	open := s.openStore
	s.openStore = func() (*store.Store, error) { return nil, errors.New("input/output error") }
	if err := s.Abort(t.Context(), "c"); err == nil {
		t.Error("aborted without a store")
	}
	wantMachine(t, m, st, "frozen committed")
	s.openStore = open
	if err := s.Abort(t.Context(), "c"); err != nil {
		t.Fatal(err)
	}
	wantMachine(t, m, st, "running")
}

// preparing begins a Prepare whose dump lasts until release is called, and
// waits until it dumps.
func preparing(t *testing.T, s *service, m *machine, ctx context.Context) (release func(error), result <-chan error) {
	t.Helper()
	dumping, end := make(chan struct{}), make(chan error, 1)
	m.dump = func(ctx context.Context) error {
		close(dumping)
		select {
		case err := <-end:
			return err
		case <-m.exited:
			return errors.New("a victim died")
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	done := make(chan error, 1)
	go func() {
		_, err := s.Prepare(ctx, "c")
		done <- err
	}()
	select {
	case <-dumping:
	case err := <-done:
		t.Fatalf("no dump: %v", err)
	}
	m.dump = func(context.Context) error { return nil }
	return func(err error) { end <- err }, done
}

// TestPrepareFails: the container runs on, and a later stop is what it would
// have been.
func TestPrepareFails(t *testing.T) {
	s, m, st := rebootable(t, checkpoint.PolicyResume)
	release, done := preparing(t, s, m, t.Context())
	wantStatus(t, s, control.Busy)
	release(errors.New("criu failed"))
	if err := <-done; err == nil || !strings.Contains(err.Error(), "criu failed") {
		t.Errorf("prepare: %v", err)
	}
	wantMachine(t, m, st, "running")
	wantStatus(t, s, control.Running)
	log, err := os.ReadFile(filepath.Join(s.config.Root, "events.jsonl"))
	if err != nil || !strings.Contains(string(log), `"dump-failed"`) || !strings.Contains(string(log), rebootReason) {
		t.Errorf("events %s, %v", log, err)
	}
	stop(t, s, 15)
	wantMachine(t, m, st, "dead committed")
}

// TestDuringPrepare: what comes while a container is being dumped for a reboot.
func TestDuringPrepare(t *testing.T) {
	failed := errors.New("criu failed")
	for _, tc := range []struct {
		name     string
		policy   checkpoint.Policy
		then     func(t *testing.T, s *service) error
		outcome  error // of the dump
		prepared bool  // Prepare succeeds
		want     string
		signals  string
	}{
		{"second prepare", checkpoint.PolicyReboot, func(t *testing.T, s *service) error {
			r, err := s.Prepare(t.Context(), "c")
			if err == nil && !r.Already {
				err = errors.New("two dumps")
			}
			return err
		}, nil, true, "frozen committed", "[]"},
		{"stop", checkpoint.PolicyReboot, term, nil, true, "dead committed", "[9]"},
		{"stop, dump fails", checkpoint.PolicyReboot, term, failed, false, "running", "[15]"},
		{"stop of resume, dump fails", checkpoint.PolicyResume, term, failed, false, "dead committed", "[9]"},
		{"abort", checkpoint.PolicyReboot, func(t *testing.T, s *service) error { return s.Abort(t.Context(), "c") }, nil, false, "running", "[]"},
		{"kill", checkpoint.PolicyReboot, func(t *testing.T, s *service) error {
			_, err := s.Kill(t.Context(), &taskAPI.KillRequest{ID: "c", Signal: 9})
			return err
		}, nil, false, "dead", "[9]"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s, m, st := rebootable(t, tc.policy)
			release, done := preparing(t, s, m, t.Context())
			then := make(chan error, 1)
			go func() { then <- tc.then(t, s) }()
			select {
			case err := <-then:
				if tc.name != "kill" {
					t.Fatalf("it did not wait: %v", err)
				}
				then <- err
			case <-time.After(100 * time.Millisecond):
			}
			if tc.name != "kill" {
				wantFrozen(t, m)
			}
			release(tc.outcome)
			if err := <-done; (err == nil) != tc.prepared {
				t.Errorf("prepare: %v", err)
			}
			if err := <-then; err != nil {
				t.Errorf("%s: %v", tc.name, err)
			}
			wantMachine(t, m, st, tc.want)
			if got := fmt.Sprint(m.signals); got != tc.signals {
				t.Errorf("signals %s, want %s", got, tc.signals)
			}
			if m.dead && m.ran > 0 && tc.outcome == nil {
				t.Errorf("it ran after the dump")
			}
		})
	}
}

func term(t *testing.T, s *service) error {
	_, err := s.Kill(t.Context(), &taskAPI.KillRequest{ID: "c", Signal: 15})
	return err
}

// TestPrepareDuringStop: a container that is being stopped is not prepared.
func TestPrepareDuringStop(t *testing.T) {
	s, m, _ := rebootable(t, checkpoint.PolicyResume)
	dumping, end := make(chan struct{}), make(chan struct{})
	m.dump = func(context.Context) error { close(dumping); <-end; return nil }
	stopped := make(chan error, 1)
	go func() { stopped <- term(t, s) }()
	<-dumping
	if _, err := s.Prepare(t.Context(), "c"); !errdefs.IsUnavailable(err) {
		t.Errorf("during the dump: %v", err)
	}
	close(end)
	if err := <-stopped; err != nil {
		t.Fatal(err)
	}

	s, _, _ = rebootable(t, checkpoint.PolicyReboot)
	stop(t, s, 15)
	if _, err := s.Prepare(t.Context(), "c"); !errdefs.IsUnavailable(err) {
		t.Errorf("after its signal: %v", err)
	}
	s.lookup("c").signalled = time.Now().Add(-stopPeriod)
	mustPrepare(t, s) // it was no stop
}

// TestPrepareCallerGone: the work goes on without the caller, who learns of it
// by calling again; by his deadline it is rolled back.
func TestPrepareCallerGone(t *testing.T) {
	s, m, st := rebootable(t, checkpoint.PolicyReboot)
	ctx, cancel := context.WithCancel(t.Context())
	release, done := preparing(t, s, m, ctx)
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("prepare: %v", err)
	}
	release(nil)
	if r := mustPrepare(t, s); !r.Already {
		t.Errorf("result %+v", r)
	}
	wantMachine(t, m, st, "frozen committed")

	s, m, st = rebootable(t, checkpoint.PolicyReboot)
	ctx, cancel = context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	release, done = preparing(t, s, m, ctx)
	if err := <-done; !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("prepare: %v", err)
	}
	release(nil)
	if err := s.lookup("c").waitWhile(t.Context(), opPreparing); err != nil {
		t.Fatal(err)
	}
	wantMachine(t, m, st, "running")
}

// TestPrepareWaitsFrozen: a container waits for a dump slot in the frozen state.
func TestPrepareWaitsFrozen(t *testing.T) {
	s, m, st := rebootable(t, checkpoint.PolicyReboot)
	s.config.DumpSlots = 1
	release, err := acquireSlot(t.Context(), s.config.RuntimeDir, 1)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		_, err := s.Prepare(t.Context(), "c")
		done <- err
	}()
	time.Sleep(100 * time.Millisecond)
	wantMachine(t, m, st, "frozen")
	release()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	wantMachine(t, m, st, "frozen committed")
}

// TestRebootRaces lets everything happen at once. Whatever comes of it, a
// container that runs has no record, and one that was dumped and is dead has
// not run since.
func TestRebootRaces(t *testing.T) {
	for i := range 100 {
		s, m, st := rebootable(t, []checkpoint.Policy{checkpoint.PolicyReboot, checkpoint.PolicyResume}[i%2])
		calls := []func(){
			func() { s.Prepare(t.Context(), "c") },
			func() { s.Prepare(t.Context(), "c") },
			func() { s.Abort(t.Context(), "c") },
			func() { s.Abort(t.Context(), "c") },
			func() { s.Status(t.Context(), "c") },
		}
		if i%4 < 2 {
			calls = append(calls, func() { term(t, s) })
		}
		if i%8 < 4 {
			calls = append(calls, func() { s.Kill(t.Context(), &taskAPI.KillRequest{ID: "c", Signal: 9}) })
		}
		var wg sync.WaitGroup
		for _, call := range calls {
			wg.Go(call)
		}
		wg.Wait()
		if err := s.lookup("c").waitWhile(t.Context(), opPreparing, opAborting, opDump); err != nil {
			t.Fatal(err)
		}
		switch got := machineState(t, m, st); got {
		case "running", "dead":
		case "frozen committed", "dead committed":
			if m.ran > 0 {
				t.Errorf("round %d: it has run since the dump", i)
			}
		default:
			t.Errorf("round %d: the container is %q", i, got)
		}
		want := map[string]control.State{"running": control.Running, "frozen": control.Prepared, "dead": control.Stopped}
		state, _, _ := strings.Cut(machineState(t, m, st), " ")
		wantStatus(t, s, want[state])
	}
}
