package shim

import (
	"context"
	"errors"
	"slices"
	"testing"

	taskAPI "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/pkg/checkpoint/store"
)

// endedInner is an inner service with a container that has ended, of which the deletion
// takes until may is closed. Like runc's it answers nothing else of it meanwhile.
type endedInner struct {
	*restoringInner
	entered, may chan struct{}
	err          error // of the next deletion
}

func (i *endedInner) State(context.Context, *taskAPI.StateRequest) (*taskAPI.StateResponse, error) {
	i.calls = append(i.calls, "state")
	return &taskAPI.StateResponse{ID: "c", Pid: 7, Status: task.Status_STOPPED, ExitStatus: 3}, nil
}

func (i *endedInner) Delete(ctx context.Context, _ *taskAPI.DeleteRequest) (*taskAPI.DeleteResponse, error) {
	i.entered <- struct{}{}
	select {
	case <-i.may:
	case <-ctx.Done():
		return nil, errgrpc.ToGRPC(ctx.Err())
	}
	i.calls = append(i.calls, "delete")
	err := i.err
	i.err = nil
	return &taskAPI.DeleteResponse{ExitStatus: 3}, err
}

// TestDeleteGoesOn: a deletion does not end with the caller who gives up, the container
// answers as one that has ended meanwhile, and the next caller has the result.
func TestDeleteGoesOn(t *testing.T) {
	s, i, c, st := pending(t)
	ended := &endedInner{restoringInner: i, entered: make(chan struct{}, 1), may: make(chan struct{})}
	s.TTRPCTaskService = ended
	request := &taskAPI.DeleteRequest{ID: "c"}
	ctx, giveUp := context.WithCancel(t.Context())
	first := make(chan error, 1)
	go func() {
		_, err := s.Delete(ctx, request)
		first <- err
	}()
	<-ended.entered
	giveUp()
	if err := errgrpc.ToNative(<-first); !errdefs.IsCanceled(err) {
		t.Fatalf("%v, want canceled", err)
	}

	// What containerd asks before it tries again.
	for _, done := range []bool{false, true} {
		if state, err := s.State(t.Context(), &taskAPI.StateRequest{ID: "c"}); err != nil || state.Status != task.Status_STOPPED || state.ExitStatus != 3 {
			t.Errorf("state %v, %v", state, err)
		}
		if r, err := s.Wait(t.Context(), &taskAPI.WaitRequest{ID: "c"}); err != nil || r.ExitStatus != 3 {
			t.Errorf("wait: %v, %v", r, err)
		}
		for signal, want := range map[unix.Signal]bool{unix.SIGKILL: true, unix.SIGTERM: true, unix.SIGUSR1: false} {
			if _, err := s.Kill(t.Context(), &taskAPI.KillRequest{ID: "c", Signal: uint32(signal)}); want != (err == nil) || err != nil && !errdefs.IsNotFound(errgrpc.ToNative(err)) {
				t.Errorf("%v: %v", signal, err)
			}
		}
		if done {
			break
		}
		if _, err := s.Create(t.Context(), &taskAPI.CreateTaskRequest{ID: "c", Bundle: writeBundle(t, nil)}); !errdefs.IsUnavailable(errgrpc.ToNative(err)) {
			t.Errorf("create: %v, want unavailable", err)
		}
		close(ended.may)
		<-c.currentDeletion().done
	}
	resp, err := s.Delete(t.Context(), request)
	if err != nil || resp.ExitStatus != 3 {
		t.Errorf("%v, %v, want the exit status", resp, err)
	}
	if got := i.calls; !slices.Equal(got, []string{"state", "delete"}) {
		t.Errorf("inner calls %q", got)
	}
	if s.lookup(c.id) != nil {
		t.Error("it is remembered")
	}
	if got := stateOf(t, st); got != store.Committed {
		t.Errorf("the checkpoint is %q, want it committed", got)
	}
}

// TestDeleteAgain: a deletion that fails may be tried again, and what the inner service
// does not know is forgotten.
func TestDeleteAgain(t *testing.T) {
	s, i, c, _ := pending(t)
	ended := &endedInner{restoringInner: i, entered: make(chan struct{}, 3), may: make(chan struct{}), err: errors.New("device or resource busy")}
	close(ended.may)
	s.TTRPCTaskService = ended
	request := &taskAPI.DeleteRequest{ID: "c"}
	if _, err := s.Delete(t.Context(), request); err == nil {
		t.Fatal("deleted")
	}
	if op, _ := c.occupied(); op != "" || c.currentDeletion() != nil {
		t.Errorf("%q holds it", op)
	}
	ended.err = errgrpc.ToGRPC(errdefs.ErrNotFound)
	if _, err := s.Delete(t.Context(), request); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		t.Errorf("%v, want not found", err)
	}
	if s.lookup(c.id) != nil {
		t.Error("it is remembered")
	}
}
