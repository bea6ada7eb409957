package criu

import (
	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/timerfd"
	"google.golang.org/protobuf/proto"
)

// filesImage holds one entry for each open file description.
const filesImage = "files.img"

// RearmTimers makes periodic timerfds go on that had expired when they were
// dumped. dir is the view of imageDir that [LinkImages] made; its list of open
// files is replaced by a copy where there is such a timer.
//
// It is needed because the kernel starts a periodic timerfd anew only when its
// expirations are read (fs/timerfd.c:timerfd_read). Until then it tells 0 as the
// time that is left, which CRIU records and passes to timerfd_settime (criu
// criu/pie/restorer.c:timerfd_arm), where 0 stops the timer for good. What is
// frozen before it is dumped has nearly always such timers.
func RearmTimers(imageDir, dir string) error {
	d, err := openImages(imageDir)
	if err != nil {
		return err
	}
	defer d.Close()
	var files []proto.Message
	rearmed := 0
	err = each(d, filesImage, magicFiles, new(fdinfo.FileEntry), func(e *fdinfo.FileEntry) error {
		if rearm(e) {
			rearmed++
		}
		files = append(files, proto.CloneOf(e))
		return nil
	})
	if absent(err) || err == nil && rearmed == 0 {
		return nil
	}
	if err != nil {
		return err
	}
	view, err := openImages(dir)
	if err != nil {
		return err
	}
	defer view.Close()
	return view.replace(filesImage, magicFiles, files...)
}

// rearm makes a file that is such a timer go on, and tells whether it is one.
func rearm(e *fdinfo.FileEntry) bool {
	t := e.Tfd
	if t == nil || !stopped(t) {
		return false
	}
	t.Vnsec = proto.Uint64(1) // at once; what it had counted stays in ticks
	return true
}

// stopped tells whether a restore would stop a timer that only waits to be read.
// One that was stopped by its program has counted nothing.
func stopped(t *timerfd.TimerfdEntry) bool {
	return t.GetTicks() > 0 && t.GetVsec() == 0 && t.GetVnsec() == 0 && (t.GetIsec() > 0 || t.GetInsec() > 0)
}
