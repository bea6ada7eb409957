package criu

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"path/filepath"

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
	img, err := d.open(filesImage, magicCommon, magicFiles)
	if absent(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer img.Close()
	out := binary.LittleEndian.AppendUint32(nil, magicCommon)
	out = binary.LittleEndian.AppendUint32(out, magicFiles)
	rearmed := 0
	for {
		var e fdinfo.FileEntry
		err := img.next(&e)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if t := e.Tfd; t != nil && stopped(t) {
			t.Vnsec = proto.Uint64(1) // at once; what it had counted stays in ticks
			rearmed++
		}
		b, err := (proto.MarshalOptions{AllowPartial: true}).Marshal(&e)
		if err != nil {
			return img.bad("%v", err)
		}
		out = append(binary.LittleEndian.AppendUint32(out, uint32(len(b))), b...)
	}
	if rearmed == 0 {
		return nil
	}
	view, err := openImages(dir)
	if err != nil {
		return err
	}
	defer view.Close()
	if err := replaceAt(view.fd, filesImage, out); err != nil {
		return fmt.Errorf("image %s: %w", filepath.Join(dir, filesImage), err)
	}
	return nil
}

// stopped tells whether a restore would stop a timer that only waits to be read.
// One that was stopped by its program has counted nothing.
func stopped(t *timerfd.TimerfdEntry) bool {
	return t.GetTicks() > 0 && t.GetVsec() == 0 && t.GetVnsec() == 0 && (t.GetIsec() > 0 || t.GetInsec() > 0)
}
