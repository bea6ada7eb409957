package shim

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	apievents "github.com/containerd/containerd/api/events"
	taskAPI "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/store"
)

// hookedInner is an inner service with a container whose hook is a signal.
type hookedInner struct {
	*restoringInner
	hook  func() error
	exits chan *taskAPI.WaitResponse // of those that were killed
}

func (i *hookedInner) Kill(_ context.Context, r *taskAPI.KillRequest) (*emptypb.Empty, error) {
	i.calls = append(i.calls, fmt.Sprintf("kill %d", r.Signal))
	if r.Signal == uint32(unix.SIGKILL) {
		i.exits <- &taskAPI.WaitResponse{ExitStatus: 137}
		return empty, nil
	}
	return empty, i.hook()
}

func (i *hookedInner) Wait(ctx context.Context, _ *taskAPI.WaitRequest) (*taskAPI.WaitResponse, error) {
	i.calls = append(i.calls, "wait")
	select {
	case r := <-i.exits:
		return r, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// hooked makes a container that was created from a checkpoint, and has a hook.
func hooked(t *testing.T) (*service, *hookedInner, *container, *store.Store) {
	t.Helper()
	s, in, c, st := pending(t)
	i := &hookedInner{restoringInner: in, hook: func() error { return nil }, exits: make(chan *taskAPI.WaitResponse, 1)}
	s.TTRPCTaskService = i
	c.settings.AfterRestore = "signal SIGUSR2"
	return s, i, c, st
}

func eventLog(t *testing.T, s *service) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(s.config.Root, "events.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestHook: the hook is run when the container runs, and nobody gets at it, nor
// is told of it, before that is done. A cold start has none.
func TestHook(t *testing.T) {
	s, i, c, st := hooked(t)
	i.hook = func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		if _, err := s.State(ctx, &taskAPI.StateRequest{ID: "c"}); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("state during the hook: %v", err)
		}
		if _, err := s.Stats(t.Context(), &taskAPI.StatsRequest{ID: "c"}); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
			t.Errorf("stats during the hook: %v", err)
		}
		if log, err := os.ReadFile(filepath.Join(s.config.Root, "events.jsonl")); err == nil {
			t.Errorf("events during the hook: %s", log)
		}
		return nil
	}
	if _, err := s.Start(t.Context(), &taskAPI.StartRequest{ID: "c"}); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(i.calls, " "); got != "start kill 12" {
		t.Errorf("inner calls %q", got)
	}
	if got := stateOf(t, st); got != "" {
		t.Errorf("the checkpoint is %s, want it consumed", got)
	}
	if log := eventLog(t, s); !strings.Contains(log, `"restored"`) || !strings.Contains(log, "hook in ") {
		t.Errorf("events %s", log)
	}
	if _, err := s.State(t.Context(), &taskAPI.StateRequest{ID: "c"}); err != nil {
		t.Errorf("state after the hook: %v", err)
	}
	i.calls, c.restoredFrom = nil, nil
	if _, err := s.Start(t.Context(), &taskAPI.StartRequest{ID: "c"}); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(i.calls, " "); got != "start" {
		t.Errorf("inner calls of a cold start %q", got)
	}
}

// TestHookFails: the container that has run is gone, containerd does not hear of
// it, and its checkpoint is not there for another restore.
func TestHookFails(t *testing.T) {
	const gone = "start kill 12 kill 9 wait delete"
	for name, tc := range map[string]struct {
		prepare func(*container)
		calls   string
		err     string
		event   string
	}{
		"cold start":    {func(*container) {}, gone + " create start", "", `"cold-start"`},
		"strict":        {func(c *container) { c.settings.OnFailure = checkpoint.OnFailureFail }, gone, "no such handler", `"restore-failed"`},
		"with an input": {func(c *container) { c.request.Stdin = "/in" }, gone, "it starts cold the next time", `"cold-start"`},
		"no FIFO":       {func(c *container) { c.request.Stdout = "/nowhere/out" }, gone, "hold output", `"cold-start"`},
		"unparsable":    {func(c *container) { c.settings.AfterRestore = "kill me" }, "start kill 9 wait delete create start", "", `"cold-start"`},
	} {
		t.Run(name, func(t *testing.T) {
			s, i, c, st := hooked(t)
			r := &recorder{}
			s.publisher.Publisher = r
			tc.prepare(c)
			left := filepath.Join(c.upper, "left")
			i.hook = func() error {
				if err := os.WriteFile(left, nil, 0o600); err != nil {
					t.Error(err)
				}
				return errors.New("no such handler")
			}
			_, err := s.Start(t.Context(), &taskAPI.StartRequest{ID: "c"})
			if (err == nil) != (tc.err == "") || err != nil && !strings.Contains(err.Error(), tc.err) {
				t.Errorf("start: %v, want %q", err, tc.err)
			}
			if got := strings.Join(i.calls, " "); got != tc.calls {
				t.Errorf("inner calls %q, want %q", got, tc.calls)
			}
			if got := stateOf(t, st); got != store.Quarantined {
				t.Errorf("the checkpoint is %q, want it quarantined", got)
			}
			if log := eventLog(t, s); !strings.Contains(log, tc.event) || !strings.Contains(log, `"reasonCode":"hook"`) || strings.Contains(log, `"restored"`) {
				t.Errorf("events %s", log)
			}
			if _, err := os.Stat(left); !os.IsNotExist(err) {
				t.Errorf("what it wrote is there: %v", err)
			}
			if c.restoredFrom != nil {
				t.Error("it counts as restored")
			}
			for _, e := range []any{
				&apievents.TaskExit{ContainerID: "c", ID: "c", Pid: 7}, &apievents.TaskDelete{ContainerID: "c"}, // of the first
				&apievents.TaskExit{ContainerID: "c", ID: "stasis-1", Pid: 7}, &apievents.TaskExit{ContainerID: "c", ID: "c", Pid: 8},
			} {
				if err := s.publisher.Publish(t.Context(), fmt.Sprintf("%T", e), e); err != nil {
					t.Fatal(err)
				}
			}
			if got := len(r.topics); got != 2 {
				t.Errorf("published %q, want the exits of others only", r.topics)
			}
		})
	}
}

// TestHookFailsClone: the template stays, and the next restart in this sandbox
// does not try it again, unless the pod wants nothing else.
func TestHookFailsClone(t *testing.T) {
	for _, strict := range []bool{false, true} {
		s, _, st := rebootable(t, checkpoint.PolicyTemplate)
		snapshot, err := s.Snapshot(t.Context(), "c", "shop")
		if err != nil {
			t.Fatal(err)
		}
		_, i, c, _ := hooked(t)
		s.TTRPCTaskService, s.containers["c"] = i, c
		id := snapshot.CheckpointID
		from := clone(id)
		c.identity, c.annotations, c.settings.Template = from.identity, from.annotations, from.settings.Template
		if strict {
			c.settings.OnFailure = checkpoint.OnFailureFail
		}
		if c.restore.claim, err = s.claim(t.Context(), st, c, id); err != nil {
			t.Fatal(err)
		}
		i.hook = func() error { return errors.New("no such handler") }
		if _, err := s.Start(t.Context(), &taskAPI.StartRequest{ID: "c"}); (err != nil) != strict {
			t.Fatalf("start, strict %v: %v", strict, err)
		}
		if all := templatesOf(t, st); len(all) != 1 || len(all[0].Pins) > 0 {
			t.Errorf("templates %+v", all)
		}
		if err := s.clonedInVain(c, id); (err == nil) != strict {
			t.Errorf("the next one, strict %v: %v", strict, err)
		}
	}
}

// TestHoldOutput: a reader does not see the end while one writer takes the place
// of another.
func TestHoldOutput(t *testing.T) {
	name := filepath.Join(t.TempDir(), "out")
	if err := unix.Mkfifo(name, 0o600); err != nil {
		t.Fatal(err)
	}
	reader, err := unix.Open(name, unix.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(reader)
	release, err := holdOutput(&taskAPI.CreateTaskRequest{Stdout: name, Stderr: name})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		w, err := os.OpenFile(name, os.O_WRONLY, 0)
		if err == nil {
			_, err = w.WriteString("x")
		}
		if err != nil {
			t.Fatal(err)
		}
		w.Close()
		var b [8]byte
		if n, err := unix.Read(reader, b[:]); n != 1 || err != nil {
			t.Errorf("read %d, %v", n, err)
		}
		if n, err := unix.Read(reader, b[:]); err != unix.EAGAIN {
			t.Errorf("read %d, %v: want neither data nor the end", n, err)
		}
	}
	release()
	var b [8]byte
	if n, err := unix.Read(reader, b[:]); n != 0 || err != nil {
		t.Errorf("read %d, %v: want the end", n, err)
	}
	release, err = holdOutput(&taskAPI.CreateTaskRequest{Stdout: "binary:///logger", Stderr: ""})
	if err != nil {
		t.Error(err)
	}
	release()
	if _, err := holdOutput(&taskAPI.CreateTaskRequest{Stdout: name + "x"}); err == nil {
		t.Error("held what is not there")
	}
}

// TestNestedExchange: calls wait for the end of the outer exchange.
func TestNestedExchange(t *testing.T) {
	c := newContainer("c")
	outer := c.beginExchange()
	inner := c.beginExchange()
	inner()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := c.waitSettled(ctx); err == nil {
		t.Error("settled within the outer exchange")
	}
	outer()
	if _, err := c.waitSettled(t.Context()); err != nil {
		t.Error(err)
	}
}
