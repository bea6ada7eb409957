package shim

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	taskAPI "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/task"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

// statefulInner runs a function whenever it is asked for the state.
type statefulInner struct {
	*inner
	asked func() task.Status
}

func (i *statefulInner) State(context.Context, *taskAPI.StateRequest) (*taskAPI.StateResponse, error) {
	return &taskAPI.StateResponse{Pid: 7, Status: i.asked()}, nil
}

// TestSecondStopSignal: of two stop signals at once only one begins a dump, and
// the other is not delivered to the container that is being dumped.
func TestSecondStopSignal(t *testing.T) {
	for _, status := range []task.Status{task.Status_RUNNING, task.Status_PAUSED} {
		s, in := testService(t)
		c := newContainer("c")
		c.optedIn, c.settings.Policy, c.startedAt = true, checkpoint.PolicyResume, time.Now()
		s.containers["c"] = c
		other := &dumpJob{done: make(chan struct{})}
		s.TTRPCTaskService = &statefulInner{in, func() task.Status {
			c.begin("dump", nil)
			c.mu.Lock()
			defer c.mu.Unlock()
			c.dump = other
			return status
		}}
		if _, err := s.Kill(t.Context(), &taskAPI.KillRequest{ID: "c", Signal: 15}); err != nil {
			t.Fatal(err)
		}
		if len(in.calls) != 0 {
			t.Errorf("%v: inner calls %v", status, in.calls)
		}
	}
}

// dumpingInner is an inner service whose dump lasts until it is cancelled, or
// until its victims died.
type dumpingInner struct {
	*inner
	died chan struct{}
}

func (i *dumpingInner) Checkpoint(ctx context.Context, _ *taskAPI.CheckpointTaskRequest) (*emptypb.Empty, error) {
	select {
	case <-i.died:
		return nil, errors.New("a victim died")
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// TestAbortLetsCRIUCleanUp: SIGKILL ends a dump through its victims, and by
// force only where that does not work.
func TestAbortLetsCRIUCleanUp(t *testing.T) {
	for _, dies := range []bool{true, false} {
		s, in := testService(t)
		i := &dumpingInner{in, make(chan struct{})}
		s.TTRPCTaskService = i
		c := newContainer("c")
		c.request = &taskAPI.CreateTaskRequest{}
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(errAborted)
		if dies {
			time.AfterFunc(50*time.Millisecond, func() { close(i.died) })
		}
		begin := time.Now()
		err := s.criuDump(ctx, c, t.TempDir(), &checkpoint.Manifest{})
		if err == nil || strings.Contains(err.Error(), "a victim died") != dies {
			t.Errorf("victim dies %v: %v", dies, err)
		}
		if d := time.Since(begin); d > 2*abortGrace {
			t.Errorf("victim dies %v: took %v", dies, d)
		}
	}
}
