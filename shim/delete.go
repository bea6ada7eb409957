package shim

import (
	"context"
	"fmt"
	"time"

	taskAPI "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
)

// deletion is the removal of a container that has ended, by the inner service.
type deletion struct {
	done chan struct{} // closed at the end; what follows is set before
	resp *taskAPI.DeleteResponse
	err  error
}

// Delete removes a container or an exec process.
func (s *service) Delete(ctx context.Context, r *taskAPI.DeleteRequest) (*taskAPI.DeleteResponse, error) {
	ctx = withFields(ctx, log.Fields{"container_id": r.ID})
	c, err := s.settled(ctx, r.ID)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	if c == nil || r.ExecID != "" {
		return s.TTRPCTaskService.Delete(ctx, r)
	}
	d := c.currentDeletion()
	if d == nil {
		if _, err := s.free(ctx, r.ID); err != nil {
			return nil, err
		}
		state, err := s.TTRPCTaskService.State(ctx, &taskAPI.StateRequest{ID: r.ID})
		if err != nil || state.Status != task.Status_STOPPED {
			// Not known to have ended: what the inner service makes of it is its
			// business, within the caller's time.
			resp, err := s.delete(ctx, c, time.Now())
			if err == nil {
				s.forget(c)
			}
			return resp, err
		}
		if d, err = s.beginDeletion(ctx, c, state); err != nil {
			return nil, errgrpc.ToGRPC(fmt.Errorf("container %s: %w", r.ID, err))
		}
	}
	select {
	case <-d.done:
	case <-ctx.Done():
		return nil, errgrpc.ToGRPC(fmt.Errorf("container %s: its deletion goes on: %w", r.ID, context.Cause(ctx)))
	}
	if d.err == nil {
		s.forget(c)
	}
	return d.resp, d.err
}

// beginDeletion begins the deletion of a container that has ended, or returns the one
// that is faster. It goes on when who asked for it waits no longer, and its result is
// kept until someone has it: containerd gives a deletion ten seconds, and then tries
// again after ever longer pauses. On a node that is that busy runc, which would be killed
// each time, would not come to its end. Until there is a result for someone the container
// answers as one that has ended, for containerd asks before it tries again.
func (s *service) beginDeletion(ctx context.Context, c *container, state *taskAPI.StateResponse) (*deletion, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.deletion != nil:
		return c.deletion, nil
	case c.busy != "":
		return nil, busyError(c.busy)
	}
	d := &deletion{done: make(chan struct{})}
	c.busy, c.state, c.deletion = opDelete, state, d
	go func() { // ends when the inner service does, which ends runc after DeleteTimeout
		defer close(d.done)
		begin := time.Now()
		detached, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.config.DeleteTimeout)
		defer cancel()
		if d.resp, d.err = s.delete(detached, c, begin); d.err != nil {
			c.end() // another may be begun
		}
		if ctx.Err() != nil {
			log.G(ctx).WithError(d.err).WithField("took", time.Since(begin).Round(time.Millisecond)).Warn("a deletion ended after its caller had gone")
		}
	}()
	return d, nil
}

// delete has the inner service delete the container, and ends what belongs to it.
// begin is when it was known to have ended.
func (s *service) delete(ctx context.Context, c *container, begin time.Time) (*taskAPI.DeleteResponse, error) {
	resp, err := s.TTRPCTaskService.Delete(ctx, &taskAPI.DeleteRequest{ID: c.id})
	switch {
	case err == nil:
	case errdefs.IsNotFound(errgrpc.ToNative(err)):
		s.forget(c)
	default:
		return nil, err
	}
	c.endTmpfs(ctx, true)
	s.abandonRestore(ctx, c)
	s.endLazy(ctx, c)
	s.noteClone(c, begin)
	return resp, err
}

// currentDeletion is the deletion that is under way, or done and yet to be told; nil for
// none.
func (c *container) currentDeletion() *deletion {
	if c == nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.deletion
}

// beingDeleted is what State answers while there is such a deletion, nil while there is none.
func (c *container) beingDeleted() *taskAPI.StateResponse {
	if c == nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.deletion == nil {
		return nil
	}
	return c.state
}
