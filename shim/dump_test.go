package shim

import (
	"context"
	"testing"
	"time"

	taskAPI "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/task"

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
